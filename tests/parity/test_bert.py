"""Our encoder with BERT's parts (sums normed after each branch, learned positions, a layer before the head) is
transformers' BertForMaskedLM."""

from __future__ import annotations

import pytest
from encoders import D, F, V, assert_same_on_padded_rows, assert_same_without_padding, paired
from transformers import BertConfig, BertForMaskedLM

from graft.config.model import ModelConfig

LAYER = r"bert\.encoder\.layer\.(\d+)\."
KIND = r"\.(weight|bias)"
NAMES = {
    r"bert\.embeddings\.word_embeddings\.weight": "embedding.weight",
    r"bert\.embeddings\.position_embeddings\.weight": "embedding.position.weight",
    r"bert\.embeddings\.token_type_embeddings\.weight": "embedding.token_type",
    r"bert\.embeddings\.LayerNorm" + KIND: r"embedding.norm.\1",
    LAYER + r"attention\.self\.query" + KIND: r"layers.\1.attention.part.q_proj.\2",
    LAYER + r"attention\.self\.key" + KIND: r"layers.\1.attention.part.k_proj.\2",
    LAYER + r"attention\.self\.value" + KIND: r"layers.\1.attention.part.v_proj.\2",
    LAYER + r"attention\.output\.dense" + KIND: r"layers.\1.attention.part.o_proj.\2",
    LAYER + r"attention\.output\.LayerNorm" + KIND: r"layers.\1.attention.post_norm.\2",
    LAYER + r"intermediate\.dense" + KIND: r"layers.\1.mlp.part.up_proj.\2",
    LAYER + r"output\.dense" + KIND: r"layers.\1.mlp.part.down_proj.\2",
    LAYER + r"output\.LayerNorm" + KIND: r"layers.\1.mlp.post_norm.\2",
    r"cls\.predictions\.transform\.dense" + KIND: r"head.transform.\1",
    r"cls\.predictions\.transform\.LayerNorm" + KIND: r"head.transform.norm.\1",
    r"cls\.predictions\.decoder\.weight": "head.weight",
    r"cls\.predictions\.(?:decoder\.)?bias": "head.bias",
}


def theirs(*, heads: int, layers: int, tied: bool) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=F,
            max_position_embeddings=16,
            layer_norm_eps=1e-2,  # large, so that a misplaced one shows
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )


def config(*, heads: int, layers: int, tied: bool) -> ModelConfig:
    norm = {"type": "layer_norm", "eps": 1e-2}
    attention = {
        "type": "attention",
        "num_heads": heads,
        "position": {"type": "none"},
        "qkv_bias": True,
        "output_bias": True,
    }
    mlp = {"type": "mlp", "intermediate_size": F, "activation": "gelu", "gated": False, "bias": True}
    return ModelConfig.model_validate(
        {
            "hidden_size": D,
            "num_layers": layers,
            "bidirectional": True,
            "norm": norm,
            "norm_placement": "post",
            "final_norm": False,
            "embedding": {"position": {"type": "learned", "max_seq_len": 16}, "token_type": True, "norm": norm},
            "blocks": {"bert": [attention, mlp]},
            "head": {
                "transform": {"activation": "gelu", "norm": norm},
                "bias": True,
                "tie_word_embeddings": tied,
            },
        }
    )


@pytest.mark.parametrize(("heads", "layers", "tied"), [(4, 2, True), (2, 1, False)])
def test_logits_and_gradients(heads: int, layers: int, tied: bool) -> None:
    shape = {"heads": heads, "layers": layers, "tied": tied}
    both = paired(theirs(**shape), config(**shape), NAMES)
    assert_same_without_padding(both)
    assert_same_on_padded_rows(both)
