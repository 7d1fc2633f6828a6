"""Our decoder with Gemma 2's parts (soft-caps, alternating windows, sandwich norms, 1 + w) is transformers' Gemma2."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM
from weights import Shape, assert_same_decoding, assert_same_logits_and_gradients, pair

from graft.config.model import ModelConfig

SHAPES = [
    Shape(heads=4, kv=2, head_dim=8, seq_len=17, window=5),
    Shape(heads=4, kv=4, head_dim=6, seq_len=9, window=9),
    Shape(heads=2, kv=1, head_dim=12, seq_len=11, window=40, tied=False),
    Shape(heads=2, kv=1, head_dim=4, seq_len=600, window=130, hidden=16),
]
NORM = {"type": "rms_norm", "eps": 1e-2, "unit_offset": True}
CAP, FINAL_CAP = 1.5, 2.0  # low, so that they bend


def theirs(shape: Shape) -> Gemma2ForCausalLM:
    more = {
        "sliding_window": shape.window,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": CAP,
        "final_logit_softcapping": FINAL_CAP,
    }
    return Gemma2ForCausalLM(Gemma2Config(**shape.theirs(**more)))


def config(shape: Shape) -> ModelConfig:
    fields = {"position": {"type": "rope"}, "query_pre_attn_scalar": 7.0, "logit_softcap": CAP}
    mlp = {"type": "mlp", "intermediate_size": 40, "activation": "gelu_tanh"}
    blocks = {
        "slide": [shape.attention(sliding_window=shape.window, **fields), mlp],
        "global": [shape.attention(**fields), mlp],
    }
    return shape.ours(
        blocks,
        layout=["slide", "global"],
        norm=NORM,
        norm_placement="sandwich",
        embedding={"scale": "sqrt_hidden_size"},
        head={"logit_softcap": FINAL_CAP},
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients(shape: Shape) -> None:
    assert_same_logits_and_gradients(*pair(theirs(shape), config(shape)), shape.ids())


@pytest.mark.parametrize("prefill", [3, 8])
def test_decoding(prefill: int) -> None:
    shape = SHAPES[0]
    assert_same_decoding(*pair(theirs(shape), config(shape)), shape.ids(), prefill)
