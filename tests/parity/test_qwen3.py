"""Our decoder with Qwen 3's parts (norms on queries and keys, heads free of the width) is transformers' Qwen3."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM
from weights import Shape, assert_same_decoding, assert_same_logits_and_gradients, pair

from graft.config.model import ModelConfig

SHAPES = [
    Shape(heads=4, kv=2, head_dim=10, seq_len=17),
    Shape(heads=4, kv=1, head_dim=16, seq_len=13, tied=False),
    Shape(heads=3, kv=3, head_dim=4, seq_len=30, layers=3),
]


def theirs(shape: Shape) -> Qwen3ForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3ForCausalLM(Qwen3Config(**shape.theirs(rope_parameters=rope)))


def config(shape: Shape) -> ModelConfig:
    attention = shape.attention(position={"type": "rope", "theta": 1e6}, qk_norm={"type": "rms_norm", "eps": 1e-2})
    return shape.ours({"decoder": [attention, {"type": "mlp", "intermediate_size": 40}]})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients(shape: Shape) -> None:
    assert_same_logits_and_gradients(*pair(theirs(shape), config(shape)), shape.ids())


def test_decoding() -> None:
    shape = SHAPES[0]
    assert_same_decoding(*pair(theirs(shape), config(shape)), shape.ids(), 6)
