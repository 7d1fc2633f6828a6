"""Layouts and per-layer overrides."""

from __future__ import annotations

from typing import Any

import pytest

from graft.config.layers import OverrideError, selected_layers
from graft.config.load import load_experiment_from_dict
from graft.config.model import ModelConfig
from graft.config.report import ConfigProblems
from graft.token_mixers.identity_config import IdentityConfig


def model(small: dict[str, Any], **changes: Any) -> ModelConfig:
    small["model"] |= changes
    return load_experiment_from_dict(small).model


def reasons(small: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        model(small, **changes)
    return [str(p).removeprefix("config  ") for p in caught.value.problems]


def windows(config: ModelConfig) -> list[int | None]:
    return [parts[0].to_dict()["sliding_window"] for parts in config.layers()]


def test_selectors() -> None:
    assert list(selected_layers("3", 8)) == [3]
    assert list(selected_layers("-1", 8)) == [7]
    assert list(selected_layers("2-4", 8)) == [2, 3, 4]
    for wrong in ("8", "-9", "4-2", "x", "", "1-8", "1.5"):
        with pytest.raises(OverrideError):
            selected_layers(wrong, 8)


def test_a_layout_repeats_to_the_number_of_layers(small: dict[str, Any]) -> None:
    blocks = {**small["model"]["blocks"], "c": [{"type": "mlp", "intermediate_size": 4}]}
    config = model(small, num_layers=6, blocks=blocks, layout=[{"block": "b", "repeat": 2}, "c"])
    assert config.layer_blocks() == ("b", "b", "c", "b", "b", "c")
    assert [len(parts) for parts in config.layers()] == [2, 2, 1, 2, 2, 1]


def test_overrides_by_type_position_and_table(small: dict[str, Any]) -> None:
    config = model(
        small,
        overrides={
            "0": {"attention.sliding_window": 3},
            "-1": {"0.sliding_window": 4},
            "1-2": {"attention": {"sliding_window": 5, "num_heads": 4}},
            "2": {"attention.sliding_window": None},
        },
    )
    assert windows(config) == [3, 5, None, 4]
    assert [parts[0].to_dict()["num_heads"] for parts in config.layers()] == [2, 4, 4, 2]
    assert config.layers()[0][1] is config.blocks["b"][1]


def test_an_override_reaches_into_tables_and_changes_types(small: dict[str, Any]) -> None:
    config = model(
        small,
        overrides={
            "0": {"attention.position.theta": 5.0},
            "1": {"attention.position": {"type": "none"}},
            "2": {"0": {"type": "mlp", "intermediate_size": 3}},
        },
    )
    layers = config.layers()
    assert layers[0][0].to_dict()["position"]["theta"] == 5.0
    assert layers[1][0].to_dict()["position"] == {"type": "none"}
    assert layers[2][0].to_dict() == layers[2][1].to_dict() | {"intermediate_size": 3}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"9": {"mlp.bias": True}}, "model.overrides.9: '9' is outside the 4 layers"),
        ({"x": {"mlp.bias": True}}, "model.overrides.x: 'x' is neither a layer (3, -1) nor a range (4-7)"),
        ({"0": {"2.bias": True}}, "model.overrides.0: the block has 2 parts, there is no part 2"),
        (
            {"0": {"moe.bias": True}},
            "model.overrides.0: 'moe' names 0 parts of the block [attention, mlp], it must name one",
        ),
        ({"0": {"mlp": 3}}, "model.overrides.0: 'mlp' names a part but no field; write mlp.<field>"),
        ({"0": {"mlp.bais": True}}, "model.overrides.0: bais: unknown key; did you mean 'bias'?"),
        ({"0": {"mlp.bias.x": True}}, "model.overrides.0: 'bias.x' goes through 'bias', which is not a table"),
        ({"0": {"mlp.type": "mpl"}}, "model.overrides.0: type: 'mpl' is no known type; one of "),
        ({"0": {"attention.num_kv_heads": 3}}, "model.overrides.0: num_kv_heads: num_heads 2 is no multiple of "),
        ({"0": {"mlp.dropout": float("nan")}}, "model.overrides.0: dropout: must be a finite number, not nan"),
        ({"1": {"attention.num_heads": 3}}, "model.overrides: layer 1: num_heads 3 does not divide hidden_size 16"),
        ({"0": 3}, "model.overrides.0: must be a table, not 3"),
    ],
)
def test_overrides_that_cannot_be(small: dict[str, Any], overrides: Any, expected: str) -> None:
    found = reasons(small, overrides=overrides)
    assert len(found) == 1, found
    assert found[0].startswith(expected)


def test_a_changed_part_must_read_both_ways_in_an_encoder(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdentityConfig, "supports_bidirectional", False)
    overrides = {"1-2": {"0": {"type": "identity"}}, "3": {"0": {"type": "ode", "mixer": {"type": "identity"}}}}
    model(small, overrides=overrides)
    found = reasons(small, overrides=overrides, bidirectional=True)
    assert [text.split(";")[0] for text in found] == [
        "model.overrides: layer 1: identity cannot be bidirectional",
        "model.overrides: layer 3: ode cannot be bidirectional",
    ]


def test_all_reasons_are_reported(small: dict[str, Any]) -> None:
    overrides = {"0": {"mlp.bais": True, "mlp.dropout": 2.0}, "7": {"mlp.bias": True}}
    assert len(reasons(small, overrides=overrides)) == 3


def passing(other: dict[str, Any]) -> dict[str, Any]:
    """Blocks of two kinds that pass values on, the second ``other``."""
    rope = {"type": "rope"}
    first = {"type": "attention", "num_heads": 2, "position": rope, "value_residual": True}
    return {"blocks": {"a": [first], "b": [{"num_heads": 2, "position": rope, **other}]}, "layout": ["a", "b"]}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"type": "sigmoid_attention", "value_residual": True}, id="the same heads"),
        pytest.param({"type": "attention", "num_heads": 1, "head_dim": 4}, id="no values taken"),
        pytest.param({"type": "attention", "num_heads": 1, "value_residual": True, "layers": "none"}, id="in no layer"),
        pytest.param(
            {"type": "attention", "num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "value_residual": True},
            id="as many key heads of the same size",
        ),
    ],
)
def test_values_may_be_passed_on(small: dict[str, Any], other: dict[str, Any]) -> None:
    model(small, **passing(other))


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        pytest.param({"type": "sigmoid_attention", "num_heads": 4, "value_residual": True}, "(4, 4)", id="number"),
        pytest.param({"type": "differential", "head_dim": 4, "value_residual": True}, "(2, 4)", id="size"),
        pytest.param({"type": "attention", "num_kv_heads": 1, "value_residual": True}, "(1, 8)", id="key heads"),
        pytest.param(
            {
                "type": "ode",
                "mixer": {"type": "attention", "num_heads": 1, "position": {"type": "none"}, "value_residual": True},
            },
            "(1, 16)",
            id="inside an ode",
        ),
    ],
)
def test_values_of_other_heads_cannot_be_mixed_in(small: dict[str, Any], other: dict[str, Any], shape: str) -> None:
    changes = passing(other)
    if other["type"] == "ode":
        changes["blocks"]["b"] = [other]
    assert reasons(small, **changes) == [
        f"model.blocks.b.0: layer 1: value_residual of heads (number, size) = {shape} cannot mix in that of layer 0, "
        "(2, 8); give all layers with value_residual the same num_kv_heads and head_dim"
    ]


def test_values_of_an_overridden_layer_are_looked_at_too(small: dict[str, Any]) -> None:
    same = passing({"type": "attention", "value_residual": True})
    (reason,) = reasons(small, **same, overrides={"-1": {"attention.num_kv_heads": 1}})
    assert reason.startswith("model.overrides: layer 3: value_residual of heads (number, size) = (1, 8)")
