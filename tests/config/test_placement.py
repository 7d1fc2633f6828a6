"""``layers``: in which layers of its block a part stands, what may not be said, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from graft.config.explain import explain
from graft.config.model import ModelConfig
from graft.model import build_model

MLP = {"type": "mlp", "intermediate_size": 4}
ATTENTION = {"type": "attention", "num_heads": 1, "position": {"type": "rope"}}


def data(layers: Any, *, num_layers: int = 6, layout: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    """Attention, an mlp in some layers, an mlp in all."""
    blocks: dict[str, Any] = {"a": [ATTENTION, {**MLP, "layers": layers}, MLP]}
    if layout:
        blocks["b"] = [ATTENTION]
    norm = {"type": "rms_norm"}
    shape = {"hidden_size": 8, "num_layers": num_layers, "norm": norm, "blocks": blocks, "layout": layout}
    return {**shape, **fields}


def standing(model: ModelConfig) -> list[int]:
    return [layer for layer, parts in enumerate(model.branches()) if "mlp" in parts]


RULES = [
    (None, [0, 1, 2, 3, 4, 5]),
    ({"first": 2}, [0, 1]),
    ({"last": 2}, [4, 5]),
    ({"every": 4}, [0, 4]),
    ([0, -1, 3], [0, 3, 5]),
    ("none", []),
]


@pytest.mark.parametrize(("layers", "expected"), RULES)
def test_chosen_layers(layers: Any, expected: list[int]) -> None:
    model = ModelConfig.model_validate(data(layers))
    assert standing(model) == expected
    assert [len(parts) for parts in model.layers()] == [3 if i in expected else 2 for i in range(6)]
    assert ModelConfig.model_validate(model.to_dict()) == model


def test_rules_count_the_layers_of_the_block() -> None:
    def chosen(layers: Any) -> list[int]:
        return standing(ModelConfig.model_validate(data(layers, layout=["b", "a", "a"])))

    assert chosen(None) == [1, 2, 4, 5]
    assert chosen({"first": 3}) == [1, 2, 4]
    assert chosen({"every": 2}) == [1, 4]
    assert chosen([-1]) == [5]  # but a list names physical layers


def test_other_parts_keep_their_names_and_starts() -> None:
    """The second mlp is called so also where the first is not."""
    everywhere = build_model(ModelConfig.model_validate(data(None)), 11, seed=0)
    some = build_model(ModelConfig.model_validate(data([2])), 11, seed=0)
    numbers = dict(everywhere.named_parameters())
    for name, parameter in some.named_parameters():
        assert parameter.equal(numbers[name]), name
    missing = {name.split(".")[1] for name in numbers.keys() - dict(some.named_parameters()).keys()}
    assert missing == {"0", "1", "3", "4", "5"}
    assert all(".mlp." in name for name in numbers.keys() - dict(some.named_parameters()).keys())


def problem(layers: Any, **fields: Any) -> str:
    raw = data(layers, **fields)
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(raw)
    issues = explain(caught.value, ModelConfig, raw)
    assert len(issues) == 1, issues
    where = ".".join(map(str, issues[0].path))
    assert where.startswith("blocks.a.1.layers"), where
    return f"{issues[0].problem}; {issues[0].fix}"


def test_what_may_not_be_said() -> None:
    assert "6, -7 is outside the 6 layers" in problem([0, 6, -7])
    assert "names a layer twice" in problem([5, -1])
    assert "layer 0 has another block; the block is in 1, 2, 4, 5" in problem([0, 1], layout=["b", "a", "a"])
    assert "7 layers of a block that is in 6; at most 6" in problem({"first": 7})
    assert "at most 4" in problem({"last": 5}, layout=["b", "a", "a"])
    assert "the list is empty" in problem([])
    assert "2 of first, last and every are set" in problem({"first": 1, "last": 1})
    assert "0 of first, last and every are set" in problem({})
    assert "did you mean 'first'" in problem({"frist": 1})
    assert "at least 1" in problem({"first": 0})
    assert "none" in problem("noone")


def test_an_override_of_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValidationError, match="stands in none of these layers"):
        ModelConfig.model_validate(data({"first": 2}, overrides={"4": {"1.bias": True}}))
    changed = ModelConfig.model_validate(data({"first": 2}, overrides={"1-4": {"1.bias": True}}))
    assert [getattr(parts["mlp"], "bias", None) for parts in changed.branches()[:2]] == [False, True]
    assert standing(changed) == [0, 1]


def test_an_override_may_move_a_part() -> None:
    model = ModelConfig.model_validate(data(None, overrides={"3": {"1.layers": "none"}}))
    assert standing(model) == [0, 1, 2, 4, 5]
