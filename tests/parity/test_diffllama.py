"""Our decoder with differential attention is transformers' DiffLlama."""

from __future__ import annotations

import pytest
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from weights import Shape, assert_same_decoding, assert_same_logits_and_gradients, pair

from graft.config.model import ModelConfig

SHAPES = [
    Shape(heads=4, kv=2, head_dim=6, seq_len=17, tied=False),
    Shape(heads=6, kv=6, head_dim=4, seq_len=13, layers=3),
]


def theirs(shape: Shape) -> DiffLlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return DiffLlamaForCausalLM(DiffLlamaConfig(**shape.theirs(rope_parameters=rope)))


def config(shape: Shape) -> ModelConfig:
    mixer = {**shape.attention(position={"type": "rope"}), "type": "differential", "head_norm_eps": 1e-2}
    return shape.ours({"decoder": [mixer, {"type": "mlp", "intermediate_size": 40}]})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients(shape: Shape) -> None:
    # transformers' softmax in fp32 is all that is left where two maps nearly cancel, before a norm blows it up
    assert_same_logits_and_gradients(*pair(theirs(shape), config(shape)), shape.ids(), gradients=2e-4)


def test_decoding() -> None:
    shape = SHAPES[0]
    assert_same_decoding(*pair(theirs(shape), config(shape)), shape.ids(), 6)
