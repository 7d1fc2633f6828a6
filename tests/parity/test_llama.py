"""Our decoder with Llama's parts is transformers' Llama."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from weights import Shape, assert_same_decoding, assert_same_logits_and_gradients, assert_same_with_left_padding, pair

from graft.config.model import ModelConfig

SHAPES = [
    Shape(heads=4, kv=4, head_dim=6, seq_len=17),
    Shape(heads=4, kv=2, head_dim=8, seq_len=17, tied=False),
    Shape(heads=8, kv=1, head_dim=4, seq_len=1, layers=1),
    Shape(heads=2, kv=1, head_dim=4, seq_len=600, layers=1, hidden=16),
]

SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        {"type": "llama3", "factor": 8.0, "original_max_seq_len": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64},
    ),
}
"""Ours and transformers' words for the same scaling of rotary positions."""


def theirs(shape: Shape, **more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**shape.theirs(**more)))


def config(shape: Shape, position: dict[str, Any] | None = None, *, biases: bool = False) -> ModelConfig:
    attention = shape.attention(position=position or {"type": "rope"}, qkv_bias=biases, output_bias=biases)
    return shape.ours({"decoder": [attention, {"type": "mlp", "intermediate_size": 40, "bias": biases}]})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients(shape: Shape) -> None:
    assert_same_logits_and_gradients(*pair(theirs(shape), config(shape)), shape.ids())


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling(name: str) -> None:
    shape = Shape(heads=2, kv=1, head_dim=16, seq_len=90, layers=1)
    foreign, own = SCALINGS[name]
    foreign = {**foreign, "rope_theta": 500.0}
    models = pair(
        theirs(shape, rope_parameters=foreign), config(shape, {"type": "rope", "theta": 500.0, "scaling": own})
    )
    assert_same_logits_and_gradients(*models, shape.ids())


def test_biases() -> None:
    shape = Shape(heads=4, kv=2, head_dim=6, seq_len=9)
    models = pair(theirs(shape, attention_bias=True, mlp_bias=True), config(shape, biases=True))
    assert_same_logits_and_gradients(*models, shape.ids())


@pytest.mark.parametrize("prefill", [1, 5])
def test_decoding(prefill: int) -> None:
    shape = Shape(heads=4, kv=2, head_dim=8, seq_len=12)
    assert_same_decoding(*pair(theirs(shape), config(shape)), shape.ids(), prefill)


def test_left_padding() -> None:
    shape = Shape(heads=4, kv=2, head_dim=8, seq_len=12)
    assert_same_with_left_padding(*pair(theirs(shape), config(shape)), shape.ids(), [0, 5])
