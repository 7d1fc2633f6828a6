"""Our encoder with ModernBERT's parts (gates, rotary positions at two bases, local and global layers, no norm before
the first attention) is transformers' ModernBertForMaskedLM.

Their ``local_attention`` L is a total reach: a token sees L // 2 on each side. Our ``sliding_window`` counts a token
and one side, so it is L // 2 + 1.
"""

from __future__ import annotations

from typing import Any

import pytest
from encoders import D, F, T, V, assert_same_on_padded_rows, assert_same_without_padding, paired
from transformers import ModernBertConfig, ModernBertForMaskedLM

from graft.config.model import ModelConfig

KIND = r"\.(weight|bias)"
LAYER = r"model\.layers\.(\d+)\."
NAMES = {
    r"model\.embeddings\.tok_embeddings\.weight": "embedding.weight",
    r"model\.embeddings\.norm" + KIND: r"embedding.norm.\1",
    LAYER + r"attn_norm" + KIND: r"layers.\1.attention.norm.\2",
    LAYER + r"attn\.Wqkv" + KIND: tuple(rf"layers.\1.attention.part.{x}_proj.\2" for x in "qkv"),
    LAYER + r"attn\.Wo" + KIND: r"layers.\1.attention.part.o_proj.\2",
    LAYER + r"mlp_norm" + KIND: r"layers.\1.mlp.norm.\2",
    LAYER + r"mlp\.Wi" + KIND: (r"layers.\1.mlp.part.gate_proj.\2", r"layers.\1.mlp.part.up_proj.\2"),
    LAYER + r"mlp\.Wo" + KIND: r"layers.\1.mlp.part.down_proj.\2",
    r"model\.final_norm" + KIND: r"final_norm.\1",
    r"head\.dense" + KIND: r"head.transform.\1",
    r"head\.norm" + KIND: r"head.transform.norm.\1",
    r"decoder\.weight": "head.weight",
    r"decoder\.bias": "head.bias",
}
LAYERS = 4


def theirs(reach: int, *, biases: bool, tied: bool) -> ModernBertForMaskedLM:
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=F,
            max_position_embeddings=64,
            global_attn_every_n_layers=3,
            local_attention=reach,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            norm_eps=1e-2,
            norm_bias=biases,
            attention_bias=biases,
            mlp_bias=biases,
            classifier_bias=biases,
            tie_word_embeddings=tied,
            attn_implementation="eager",
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        )
    )


def config(reach: int, *, biases: bool, tied: bool) -> ModelConfig:
    norm = {"type": "layer_norm", "eps": 1e-2, "bias": biases}

    def attention(theta: float, **more: Any) -> dict[str, Any]:
        position = {"type": "rope", "theta": theta}
        return {
            "type": "attention",
            "num_heads": 4,
            "position": position,
            "qkv_bias": biases,
            "output_bias": biases,
            **more,
        }

    mlp = {"type": "mlp", "intermediate_size": F, "activation": "gelu", "gated": True, "bias": biases}
    far, near = attention(500.0), attention(20.0, sliding_window=reach // 2 + 1)
    return ModelConfig.model_validate(
        {
            "hidden_size": D,
            "num_layers": LAYERS,
            "bidirectional": True,
            "norm": norm,
            "embedding": {"norm": norm},
            "blocks": {"first": [{**far, "norm_placement": "none"}, mlp], "far": [far, mlp], "near": [near, mlp]},
            "layout": ["first", "near", "near", "far"],
            "head": {
                "transform": {"activation": "gelu", "norm": norm, "bias": biases},
                "bias": True,
                "tie_word_embeddings": tied,
            },
        }
    )


@pytest.mark.parametrize(("reach", "biases", "tied"), [(6, False, True), (5, True, False)])
def test_logits_and_gradients(reach: int, biases: bool, tied: bool) -> None:
    shape = {"biases": biases, "tied": tied}
    both = paired(theirs(reach, **shape), config(reach, **shape), NAMES)
    assert_same_without_padding(both)
    # in fp64 transformers' mask overflows: padding that sees no real token would be NaN, and spread
    assert_same_on_padded_rows(both, (T, T - reach // 2, T - 1))
