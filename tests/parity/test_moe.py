"""Our decoder with a mixture of experts is transformers' Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from weights import TOLERANCE, Shape, assert_close, assert_same_decoding, our_name, randomize

from graft.config.model import ModelConfig
from graft.model import Model, build_model

SHAPE = Shape(heads=4, kv=2, head_dim=8, seq_len=23, tied=False)
WHOLE = Shape(heads=1, kv=1, head_dim=24, seq_len=23, tied=False)
"""OLMoE norms queries and keys over all heads at once: with one head that is the norm of a head."""

F = 20
ROPE = {"type": "rope", "theta": 1e3}
MODULES = {
    "gate": "router",
    "experts": "experts",
    "shared_experts": "shared_experts",
    "shared_expert": "shared_experts",
    "shared_expert_gate": "shared_gate",
}
"""A module of a mixture there -> here."""


def ours(shape: Shape, mixer: dict[str, Any], **moe: Any) -> ModelConfig:
    experts = {"type": "moe", "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": F, **moe}
    return shape.ours({"decoder": [mixer, experts]})


def theirs(model: Any, config: Any, shape: Shape, **more: Any) -> torch.nn.Module:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}
    sizes = {"num_experts_per_tok": 3, "moe_intermediate_size": F, **rope, **more}
    return model(config(**shape.theirs(**sizes), experts_implementation="eager"))


def mixtral(**more: Any) -> tuple[torch.nn.Module, ModelConfig]:
    sizes = {"num_local_experts": 8, "intermediate_size": F}
    other = theirs(MixtralForCausalLM, MixtralConfig, SHAPE, **sizes, **more)
    return other, ours(SHAPE, SHAPE.attention(position=ROPE))


def olmoe() -> tuple[torch.nn.Module, ModelConfig]:
    other = theirs(OlmoeForCausalLM, OlmoeConfig, WHOLE, num_experts=8, intermediate_size=F, norm_topk_prob=False)
    norm = {"type": "rms_norm", "eps": 1e-2}
    return other, ours(WHOLE, WHOLE.attention(position=ROPE, qk_norm=norm), norm_topk_prob=False)


def qwen2() -> tuple[torch.nn.Module, ModelConfig]:
    sizes = {"num_experts": 8, "shared_expert_intermediate_size": 2 * F, "norm_topk_prob": False}
    other = theirs(Qwen2MoeForCausalLM, Qwen2MoeConfig, WHOLE, **sizes)
    shared = {"num_shared_experts": 2, "shared_expert_gate": True}
    return other, ours(WHOLE, WHOLE.attention(position=ROPE, qkv_bias=True), norm_topk_prob=False, **shared)


def qwen3() -> tuple[torch.nn.Module, ModelConfig]:
    other = theirs(Qwen3MoeForCausalLM, Qwen3MoeConfig, SHAPE, num_experts=8, norm_topk_prob=True)
    return other, ours(SHAPE, SHAPE.attention(position=ROPE, qk_norm={"type": "rms_norm", "eps": 1e-2}))


def deepseek() -> tuple[torch.nn.Module, ModelConfig]:
    sizes = {"q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10}
    shape = Shape(heads=3, kv=3, head_dim=8, seq_len=23, tied=False)
    groups = {"n_group": 4, "topk_group": 2, "n_routed_experts": 8, "n_shared_experts": 2}
    more = {"first_k_dense_replace": 0, "num_mtp_layers": 0, "routed_scaling_factor": 2.5}
    other = theirs(DeepseekV3ForCausalLM, DeepseekV3Config, shape, **sizes, **groups, **more)
    mixer = {"type": "mla", "num_heads": 3, **sizes, "position": ROPE, "rope_interleave": True}
    router = {"scoring": "sigmoid", "num_groups": 4, "num_groups_per_tok": 2, "routed_scaling_factor": 2.5}
    return other, ours(shape, mixer, **router, num_shared_experts=2, balance_bias_rate=0.0)


def in_our_words(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """One of transformers' tensors as ours, by name: the gate and up matrices of experts are one there."""
    _, _, index, owner, *rest = [*name.split("."), "", ""] if name.startswith("model.layers") else [""] * 4
    if owner != "mlp":
        yield our_name(name, config).replace(".mlp.", ".moe."), tensor
        return
    module, *inside = [word for word in rest if word]
    prefix = f"layers.{index}.moe.part.{MODULES[module]}."
    if inside == ["gate_up_proj"]:
        yield f"{prefix}gate_proj.weight", tensor[:, :F]
        yield f"{prefix}up_proj.weight", tensor[:, F:]
    elif inside == ["e_score_correction_bias"]:
        yield f"{prefix}balance_bias", tensor
    else:
        yield prefix + ".".join(inside if module != "experts" else [*inside, "weight"]), tensor


def pair(models: tuple[torch.nn.Module, ModelConfig]) -> tuple[torch.nn.Module, Model]:
    """Both in fp64 with the same random weights and biases of choice; nothing on either side is left out."""
    other, config = models
    other = other.double().eval()
    randomize(other)
    mine = build_model(config, SHAPE.vocab, seed=0, dtype=torch.float64).eval()
    for name, buffer in other.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    tensors = {n: t for n, t in other.state_dict().items() if "inv_freq" not in n}
    copied = dict(pair for name, tensor in tensors.items() for pair in in_our_words(name, tensor, config))
    assert copied.keys() == mine.state_dict().keys()
    mine.load_state_dict(copied)
    return other, mine


def assert_same_gradients(other: torch.nn.Module, mine: Model, tolerance: float) -> None:
    gradients = {name: p.grad for name, p in mine.named_parameters()}
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None
        for our, grad in in_our_words(name, parameter.grad, mine.config):
            actual = gradients[our]
            assert actual is not None
            assert_close(actual, grad, f"gradient of {our}", tolerance)


MODELS = {
    mixtral: TOLERANCE,
    olmoe: TOLERANCE,
    qwen2: TOLERANCE,
    qwen3: TOLERANCE,
    deepseek: 1e-5,  # its router multiplies in fp32 even in an fp64 model
}


@pytest.mark.parametrize("make", MODELS)
def test_logits_and_gradients(make: Callable[[], tuple[torch.nn.Module, ModelConfig]]) -> None:
    other, mine = pair(make())
    ids = SHAPE.ids()
    expected, actual = other(ids).logits, mine(ids)
    assert_close(actual, expected, "logits", MODELS[make])
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    assert_same_gradients(other, mine, 10 * MODELS[make])


def test_decoding() -> None:
    assert_same_decoding(*pair(mixtral()), SHAPE.ids(), 6)


def test_balance_loss_of_one_row() -> None:
    """One layer: transformers averages shares and probabilities over layers, ours has a loss for each."""
    other, mine = pair((mixtral(num_hidden_layers=1)[0], mixtral()[1].replace(num_layers=1)))
    ids = SHAPE.ids(1)
    expected = other(ids, output_router_logits=True, labels=ids).aux_loss
    coef = mine.config.blocks["decoder"][1].router_aux_loss_coef
    actual = mine.features(ids).aux["router_balance"] / coef / ids.numel()
    assert_close(actual, expected.double(), "loss")
    expected.backward()
    actual.backward()
    name = "layers.0.moe.part.router.weight"
    theirs_grad = other.get_parameter("model.layers.0.mlp.gate.weight").grad
    mine_grad = mine.get_parameter(name).grad
    assert theirs_grad is not None
    assert mine_grad is not None
    assert_close(mine_grad, theirs_grad, f"gradient of {name}", 10 * TOLERANCE)
