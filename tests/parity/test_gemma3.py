"""Our decoder with Gemma 3's parts (two rope bases, windows, sandwich norms, qk-norm) is transformers' Gemma3."""

from __future__ import annotations

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from weights import Shape, assert_same_decoding, assert_same_logits_and_gradients, pair

from graft.config.model import ModelConfig

SHAPES = [
    Shape(heads=4, kv=1, head_dim=8, seq_len=17, window=4, layers=3),
    Shape(heads=4, kv=2, head_dim=10, seq_len=12, window=12, layers=3, tied=False),
    Shape(heads=2, kv=2, head_dim=4, seq_len=10, window=64, layers=3),
    Shape(heads=2, kv=1, head_dim=4, seq_len=520, window=200, layers=3, hidden=16),
]
NORM = {"type": "rms_norm", "eps": 1e-2, "unit_offset": True}


def theirs(shape: Shape) -> Gemma3ForCausalLM:
    more = {
        "sliding_window": shape.window,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 5,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape.theirs(**more)))


def config(shape: Shape) -> ModelConfig:
    fields = {"query_pre_attn_scalar": 5.0, "qk_norm": NORM}
    local, far = ({"type": "rope", "theta": theta} for theta in (100.0, 1e6))
    mlp = {"type": "mlp", "intermediate_size": 40, "activation": "gelu_tanh"}
    blocks = {
        "slide": [shape.attention(sliding_window=shape.window, position=local, **fields), mlp],
        "global": [shape.attention(position=far, **fields), mlp],
    }
    return shape.ours(
        blocks,
        layout=["slide", "slide", "global"],
        norm=NORM,
        norm_placement="sandwich",
        embedding={"scale": "sqrt_hidden_size"},
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients(shape: Shape) -> None:
    assert_same_logits_and_gradients(*pair(theirs(shape), config(shape)), shape.ids())


@pytest.mark.parametrize("prefill", [1, 7])
def test_decoding(prefill: int) -> None:
    shape = SHAPES[0]
    assert_same_decoding(*pair(theirs(shape), config(shape)), shape.ids(), prefill)
