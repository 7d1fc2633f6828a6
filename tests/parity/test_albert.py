"""Our encoder with ALBERT's parts (a narrow table behind a projection, one layer run several times) is transformers'
AlbertForMaskedLM."""

from __future__ import annotations

import pytest
from encoders import D, F, V, assert_same_on_padded_rows, assert_same_without_padding, paired
from transformers import AlbertConfig, AlbertForMaskedLM

from graft.config.model import ModelConfig

LAYER = r"albert\.encoder\.albert_layer_groups\.0\.albert_layers\.(\d+)\."
KIND = r"\.(weight|bias)"
NAMES = {
    r"albert\.embeddings\.word_embeddings\.weight": "embedding.weight",
    r"albert\.embeddings\.position_embeddings\.weight": "embedding.position.weight",
    r"albert\.embeddings\.token_type_embeddings\.weight": "embedding.token_type",
    r"albert\.embeddings\.LayerNorm" + KIND: r"embedding.norm.\1",
    r"albert\.encoder\.embedding_hidden_mapping_in" + KIND: r"embedding.projection.\1",
    LAYER + r"attention\.query" + KIND: r"layers.\1.attention.part.q_proj.\2",
    LAYER + r"attention\.key" + KIND: r"layers.\1.attention.part.k_proj.\2",
    LAYER + r"attention\.value" + KIND: r"layers.\1.attention.part.v_proj.\2",
    LAYER + r"attention\.dense" + KIND: r"layers.\1.attention.part.o_proj.\2",
    LAYER + r"attention\.LayerNorm" + KIND: r"layers.\1.attention.post_norm.\2",
    LAYER + r"ffn" + KIND: r"layers.\1.mlp.part.up_proj.\2",
    LAYER + r"ffn_output" + KIND: r"layers.\1.mlp.part.down_proj.\2",
    LAYER + r"full_layer_layer_norm" + KIND: r"layers.\1.mlp.post_norm.\2",
    r"predictions\.dense" + KIND: r"head.transform.\1",
    r"predictions\.LayerNorm" + KIND: r"head.transform.norm.\1",
    r"predictions\.bias": "head.bias",
}


def theirs(size: int, *, loops: int, inner: int) -> AlbertForMaskedLM:
    return AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=V,
            embedding_size=size,
            hidden_size=D,
            num_hidden_layers=loops,
            num_hidden_groups=1,
            inner_group_num=inner,
            num_attention_heads=4,
            intermediate_size=F,
            max_position_embeddings=16,
            layer_norm_eps=1e-2,
            attn_implementation="eager",
        )
    )


def config(size: int, *, loops: int, inner: int) -> ModelConfig:
    norm = {"type": "layer_norm", "eps": 1e-2}
    attention = {
        "type": "attention",
        "num_heads": 4,
        "position": {"type": "none"},
        "qkv_bias": True,
        "output_bias": True,
    }
    mlp = {"type": "mlp", "intermediate_size": F, "activation": "gelu_tanh", "gated": False, "bias": True}
    embedding = {"position": {"type": "learned", "max_seq_len": 16}, "token_type": True, "norm": norm}
    return ModelConfig.model_validate(
        {
            "hidden_size": D,
            "num_layers": inner,
            "loops": loops,
            "bidirectional": True,
            "norm": norm,
            "norm_placement": "post",
            "final_norm": False,
            "embedding": {**embedding, "size": size, "projection_bias": True},
            "blocks": {"albert": [attention, mlp]},
            "head": {"transform": {"size": size, "activation": "gelu_tanh", "norm": norm}, "bias": True},
        }
    )


@pytest.mark.parametrize(("size", "loops", "inner"), [(8, 3, 1), (12, 2, 2)])
def test_logits_and_gradients(size: int, loops: int, inner: int) -> None:
    shape = {"loops": loops, "inner": inner}
    both = paired(theirs(size, **shape), config(size, **shape), NAMES)
    assert_same_without_padding(both)
    assert_same_on_padded_rows(both)
