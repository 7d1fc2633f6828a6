"""What ``graft parts`` says of the variants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from graft.config.base import SET, Config, knob
from graft.config.describe import all_variants, describe, matching, plain_value, type_words
from graft.config.families import ChannelMixerConfig, Norm
from graft.config.registry import PACKAGES, variants


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "whole number or null"),
        (tuple[str, ...], "list of text"),
        (tuple[float, float], "[number, number]"),
        (Literal["a", "b"] | float, "a | b or number"),
        (Mapping[str, tuple[bool, ...]], "table of list of true or false"),
        (Norm | None, "norm or null"),
        (Config, "table"),
        (Any, "anything"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert type_words(annotation) == words


@pytest.mark.usefixtures("registry_restored")
def test_a_field_says_everything_about_itself() -> None:
    class DescribedConfig(ChannelMixerConfig):
        """First line.

        Second paragraph.
        """

        implementation = "tests.config.test_describe:Nothing"
        type: Literal["described"] = knob("described", "tag")
        rate: float = knob(0.5, "a rate per step", gt=0.0, le=1.0)
        size: int = knob(doc="a size")
        extra: int = knob(1, "an extra", only_if={"rate": SET, "size": (1, 2)})

    doc = describe(DescribedConfig)
    assert (doc.family, doc.type, doc.summary) == ("channel_mixer", "described", "First line.")
    fields = {f.name: f for f in doc.fields}
    assert "type" not in fields
    assert (fields["rate"].type, fields["rate"].range, fields["rate"].default) == ("number", "> 0.0, <= 1.0", 0.5)
    assert (fields["size"].required, fields["rate"].required) == (True, False)
    assert fields["extra"].only_if == "rate is set and size is 1 or 2"
    assert fields["norm"].type == "norm or null"


def test_every_variant_and_field_is_documented() -> None:
    found = all_variants()
    assert {v.family for v in found} <= set(PACKAGES)
    assert len(found) == sum(len(variants(family)) for family in PACKAGES)
    for variant in found:
        assert variant.summary, variant.type
        assert variant.type
        for field in variant.fields:
            assert field.doc, f"{variant.type}.{field.name} has no documentation"
    json.dumps([v.to_dict() for v in found], allow_nan=False)


def test_matching_by_family_type_or_both() -> None:
    assert {v.type for v in matching("norm")} == set(variants("norm"))
    assert [v.family for v in matching("attention")] == ["token_mixer"]
    assert [v.type for v in matching("schedule.linear")] == ["linear"]
    assert {v.family for v in matching("linear")} == {"linear", "schedule"}
    assert matching("nothing") == []


def test_values_on_one_line() -> None:
    assert [plain_value(v) for v in (None, "", "a", 1.5, {"x": [True]})] == ["null", '""', "a", "1.5", '{"x": [true]}']
