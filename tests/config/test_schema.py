"""The exported JSON Schema: valid, complete, and in agreement with the decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from graft.config.base import Config, knob
from graft.config.documents import read_document
from graft.config.families import ChannelMixerConfig
from graft.config.includes import preset_folders
from graft.config.schema import config_schema

PRESETS = sorted(path for folder in preset_folders()[:1] for path in folder.rglob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return config_schema()


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_there_are_presets() -> None:
    assert PRESETS


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_preset_agrees_with_the_schema(validator: jsonschema.Draft202012Validator, path: Path) -> None:
    assert [e.message for e in validator.iter_errors(read_document(path).root.plain())] == []


WRONG = {
    "unknown key": lambda d: d["model"].update(hiden_size=1),
    "unknown type": lambda d: d["model"]["norm"].update(type="batch_norm"),
    "no type": lambda d: d["model"]["norm"].pop("type"),
    "missing": lambda d: d["model"].pop("hidden_size"),
    "out of range": lambda d: d["model"].update(num_layers=0),
    "wrong kind": lambda d: d.update(seed="1"),
    "another variant's field": lambda d: d["model"]["blocks"]["b"][1].update(num_heads=2),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_do_not_pass_the_schema(
    validator: jsonschema.Draft202012Validator, small: dict[str, Any], name: str
) -> None:
    assert validator.is_valid(small)
    WRONG[name](small)
    assert not validator.is_valid(small)


def test_a_config_with_a_base_may_leave_things_out(validator: jsonschema.Draft202012Validator) -> None:
    data: dict[str, Any] = {"base": "x.yaml", "model": {"norm": {"eps": 1e-5}, "blocks": {"b": None}}}
    assert validator.is_valid(data)
    assert not validator.is_valid({key: value for key, value in data.items() if key != "base"})
    wrong = copy.deepcopy(data)
    wrong["model"]["normm"] = {}
    assert not validator.is_valid(wrong)


def tables(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from tables(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from tables(value)


def test_every_field_has_its_documentation_and_default(schema: dict[str, Any]) -> None:
    names = [name for name in schema["$defs"] if not name.startswith("partial.")]
    assert {"Experiment", "AttentionConfig", "TrainingConfig"} <= set(names)
    for name in names:
        definition = schema["$defs"][name]
        for field, entry in definition["properties"].items():
            assert entry["description"], (name, field)
            assert "default" in entry or field in definition["required"], (name, field)


def test_all_references_lead_somewhere(schema: dict[str, Any]) -> None:
    references = [t["$ref"] for t in tables(schema) if isinstance(t.get("$ref"), str)]
    assert references
    assert {r.removeprefix("#/$defs/") for r in references} <= set(schema["$defs"])
    inside_partial = [t for name, d in schema["$defs"].items() if name.startswith("partial.") for t in tables(d)]
    assert all(t["$ref"].startswith("#/$defs/partial.") for t in inside_partial if isinstance(t.get("$ref"), str))


@pytest.mark.usefixtures("registry_restored")
def test_conditions_are_in_the_description_and_equal_class_names_are_kept_apart() -> None:
    class MlpConfig(ChannelMixerConfig):  # another class of this name exists
        """Test."""

        implementation = "tests.config.test_schema:Nothing"
        type: Literal["schema_test"] = knob("schema_test", "tag")
        inner: Config | None = knob(None, "something")
        width: int = knob(3, "a width", only_if={"residual_dropout": (0.1, 0.2)})

    definitions = config_schema()["$defs"]
    (mine,) = (
        d
        for n, d in definitions.items()
        if "type" in d["properties"] and "partial" not in n and d["properties"]["type"].get("const") == "schema_test"
    )
    assert mine["properties"]["width"]["description"] == "a width (acts only if residual_dropout is 0.1 or 0.2)"
    assert mine["required"] == ["type"]
