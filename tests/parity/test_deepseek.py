"""Our decoder with latent attention is transformers' DeepSeek V2 and V3 (their dense layers)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from weights import Shape, assert_same_decoding, assert_same_logits_and_gradients, pair

from graft.config.model import ModelConfig

SIZES = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10}
SHAPE = Shape(heads=3, kv=3, head_dim=8, seq_len=17, tied=False)
MODELS = {2: (DeepseekV2ForCausalLM, DeepseekV2Config), 3: (DeepseekV3ForCausalLM, DeepseekV3Config)}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
MSCALES = [{}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"mscale_all_dim": 0.0, "mscale": 1.0}]
"""Both, or none: alone, transformers drops mscale, and takes 1 for it beside mscale_all_dim."""


def theirs(version: int, q_lora_rank: int | None, rope: dict[str, Any], **more: Any) -> torch.nn.Module:
    model, config = MODELS[version]
    sizes = {**SHAPE.theirs(rope_parameters={"rope_theta": 1e3, **rope}), **SIZES, "q_lora_rank": q_lora_rank}
    return model(config(**sizes, first_k_dense_replace=SHAPE.layers, num_mtp_layers=0, **more))


def ours(q_lora_rank: int | None, scaling: dict[str, Any] | None = None, **more: Any) -> ModelConfig:
    position = {"type": "rope", "theta": 1e3, "scaling": scaling}
    mixer = {"type": "mla", "num_heads": 3, **SIZES, "q_lora_rank": q_lora_rank, "position": position, **more}
    return SHAPE.ours({"decoder": [mixer, {"type": "mlp", "intermediate_size": 40}]})


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("q_lora_rank", [None, 14])
def test_logits_and_gradients(version: int, q_lora_rank: int | None) -> None:
    models = pair(theirs(version, q_lora_rank, {"rope_type": "default"}), ours(q_lora_rank, rope_interleave=True))
    assert_same_logits_and_gradients(*models, SHAPE.ids())


def test_pairs_of_halves() -> None:
    models = pair(theirs(3, None, {"rope_type": "default"}, rope_interleave=False), ours(None))
    assert_same_logits_and_gradients(*models, SHAPE.ids())


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("mscale", MSCALES, ids=str)
def test_yarn(version: int, mscale: dict[str, float]) -> None:
    scaling = {"type": "yarn", "original_max_seq_len": 16, **{k: v for k, v in YARN.items() if "max" not in k}}
    models = pair(
        theirs(version, 14, {"rope_type": "yarn", **YARN, **mscale}),
        ours(14, scaling, rope_interleave=True, **mscale),
    )
    assert_same_logits_and_gradients(*models, SHAPE.ids())


@pytest.mark.parametrize("version", MODELS)
def test_decoding(version: int) -> None:
    models = pair(theirs(version, 14, {"rope_type": "default"}), ours(14, rope_interleave=True))
    assert_same_decoding(*models, SHAPE.ids(), 6)
