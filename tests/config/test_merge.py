"""``base:`` includes, the merge rule, and dotted overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from graft.config.documents import READERS
from graft.config.includes import find_config, preset_folders, read_with_bases
from graft.config.load import load_experiment
from graft.config.merge import merge
from graft.config.overrides import apply_overrides
from graft.config.report import ConfigProblems
from graft.config.tree import Place, from_plain

Write = Callable[[str, str], str]


def merged(below: Any, above: Any) -> Any:
    return merge(from_plain(below, Place("below")), from_plain(above, Place("above"))).plain()


@pytest.mark.parametrize(
    ("below", "above", "result"),
    [
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"x": 1}}, {"a": 3}, {"a": 3}),
        ({"a": 3}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"n": {"type": "p", "x": 1}}, {"n": {"type": "q"}}, {"n": {"type": "q"}}),
        ({"n": {"type": "p", "x": 1}}, {"n": {"type": "p", "y": 2}}, {"n": {"type": "p", "x": 1, "y": 2}}),
        ({"n": {"type": "p", "x": 1}}, {"n": {"x": 2}}, {"n": {"type": "p", "x": 2}}),
        ({"n": {"x": 1}}, {"n": {"type": "p"}}, {"n": {"x": 1, "type": "p"}}),
        ({"a": 1}, {"a": None}, {"a": None}),
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ],
)
def test_the_merge_rule(below: Any, above: Any, result: Any) -> None:
    assert merged(below, above) == result


def test_merging_changes_neither_side() -> None:
    below, above = from_plain({"a": {"x": 1}}, Place("below")), from_plain({"a": {"y": 2}}, Place("above"))
    merge(below, above)
    assert below.plain() == {"a": {"x": 1}}
    assert above.plain() == {"a": {"y": 2}}


def test_a_base_is_found_beside_the_file_and_places_stay_true(write: Write, small_yaml: str, problems: Any) -> None:
    write("bases/small.yaml", small_yaml.replace("learning_rate: 1e-3", "learning_rate: -1"))
    write("bases/middle.yaml", "base: small.yaml\nmodel: {num_layers: 0}\n")
    write("top.yaml", "base: bases/middle.yaml\nmodel: {hidden_size: 0}\nseed: 3\n")
    assert problems("top.yaml") == [
        "bases/middle.yaml:2:21  model.num_layers: must be at least 1, not 0",
        "bases/small.yaml:12:41  optimizer.learning_rate: must be greater than 0, not -1",
        "top.yaml:2:22  model.hidden_size: must be at least 1, not 0",
    ]


def test_bases_may_be_of_another_format(write: Write, small_yaml: str) -> None:
    write("small.yaml", small_yaml)
    write("top.json", '{"base": "small.yaml", "model": {"norm": {"type": "layer_norm"}}}')
    write("other.toml", 'base = "top.json"\n[training]\nmax_steps = 20\n')
    experiment = load_experiment("other.toml")
    assert experiment.training.max_steps == 20
    assert experiment.model.norm.to_dict() == {"type": "layer_norm", "eps": 1e-5, "bias": True}


def test_null_removes_a_block_of_the_base(write: Write, small_yaml: str) -> None:
    write("small.yaml", small_yaml)
    write("top.yaml", "base: small.yaml\nmodel: {blocks: {b: null, c: [{type: mlp, intermediate_size: 8}]}}\n")
    assert list(load_experiment("top.yaml").model.blocks) == ["c"]


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "missing.yaml", '""'])
def test_a_base_must_be_a_file(write: Write, base: str) -> None:
    write("top.yaml", f"seed: 1\nbase: {base}\n")
    with pytest.raises(ConfigProblems, match=r"top.yaml:2:7  base:"):
        read_with_bases("top.yaml")


def test_presets_are_found_from_anywhere(write: Write) -> None:
    write("top.yaml", "seed: 1")
    folders = preset_folders()
    assert folders
    preset = next(folders[0].rglob("*.yaml"))
    name = f"presets/{preset.relative_to(folders[0])}"
    assert find_config(name, preset.parent).samefile(preset)
    assert find_config("presets/none/such.yaml", preset.parent) == preset.parent / "presets/none/such.yaml"


def overridden(data: Any, *overrides: str) -> Any:
    root, problems = apply_overrides(from_plain(data, Place("file")), overrides)
    assert problems == []
    return root.plain()


@pytest.mark.parametrize(
    ("data", "override", "result"),
    [
        ({"a": {"b": 1}}, "a.b=2", {"a": {"b": 2}}),
        ({}, "a.b.c=1e-4", {"a": {"b": {"c": 1e-4}}}),
        ({"a": [{"x": 1}, {"x": 2}]}, "a.1.x=3", {"a": [{"x": 1}, {"x": 3}]}),
        ({"a": [1]}, "a.1=2", {"a": [1, 2]}),
        ({"a": 1}, "a=null", {"a": None}),
        ({"a": 1}, "a=[1, {b: yes}]", {"a": [1, {"b": "yes"}]}),
        ({"a": 1}, "a=b=c", {"a": "b=c"}),
        ({"n": {"type": "p", "x": 1}}, "n.type=q", {"n": {"type": "q"}}),
        ({"n": {"type": "p", "x": 1}}, "n.type=p", {"n": {"type": "p", "x": 1}}),
        ({"n": {"type": "p", "x": 1}}, "n={type: q, y: 2}", {"n": {"type": "q", "y": 2}}),
        ({"n": {"type": "p", "x": 1}}, "n={y: 2}", {"n": {"type": "p", "x": 1, "y": 2}}),
        ({"l": [{"n": {"type": "p", "x": 1}}]}, "l.0.n.type=q", {"l": [{"n": {"type": "q"}}]}),
        ({"o": {}}, 'o.0."attention.window"=4', {"o": {"0": {"attention.window": 4}}}),
        ({"o": {}}, "o.-1.x=4", {"o": {"-1": {"x": 4}}}),
    ],
)
def test_an_override_is_laid_over_the_config(data: Any, override: str, result: Any) -> None:
    assert overridden(data, override) == result


def test_overrides_apply_in_order() -> None:
    assert overridden({"n": {"type": "p", "x": 1}}, "n.type=q", "n.y=2", "n.y=3") == {"n": {"type": "q", "y": 3}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "not of the form"),
        ("=3", "not of the form"),
        ("a..b=3", "not of the form"),
        ("a.=3", "not of the form"),
        ("seed=", "has no value; write seed=null"),
        ("seed=[1", "not YAML"),
        ("l.5=1", "items 0 to 1, not '5'; use 2 to append"),
        ("l.x=1", "a list is indexed by number"),
        ("a={b: 1, b: 2}", "given twice"),
    ],
)
def test_overrides_that_make_no_sense_are_reported(override: str, expected: str) -> None:
    _, problems = apply_overrides(from_plain({"l": [1, 2]}, Place("file")), [override])
    assert len(problems) == 1
    assert str(problems[0]).startswith(f"override '{override}'  ")
    assert expected in str(problems[0])


def test_the_place_of_an_overridden_value_is_the_override(write: Write, small_yaml: str, problems: Any) -> None:
    write("small.yaml", small_yaml)
    assert problems("small.yaml", "model.hidden_size=0", "model.blocks.b.0.heads=8") == [
        "override 'model.blocks.b.0.heads=8'  model.blocks.b.0.heads: unknown key; did you mean 'num_heads'?",
        "override 'model.hidden_size=0'  model.hidden_size: must be at least 1, not 0",
    ]


def test_the_original_tree_is_left_alone() -> None:
    root = READERS[".yaml"]("a: {b: [1, 2]}\n", "f").root
    apply_overrides(root, ["a.b.0=5"])
    assert root.plain() == {"a": {"b": [1, 2]}}
