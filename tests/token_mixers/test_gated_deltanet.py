"""The gated delta network's mixer: Qwen3-Next's layer as oracle, documents, decoding, cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recurrent_checks import (
    assert_decoding_equals_forward,
    assert_documents_are_alone,
    build,
    context,
    decoded,
    splits,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from graft.part import parameter_roles
from graft.token_mixers.gated_deltanet import GatedDeltaNet
from graft.token_mixers.gated_deltanet_config import GatedDeltaNetConfig

K, N, H, V = 2, 4, 5, 3
TOLERANCE = 1e-5
"""Of the largest value: transformers computes in fp32 whatever the inputs."""


def part(**fields) -> GatedDeltaNet:
    sizes = {"num_k_heads": K, "num_v_heads": N, "head_dim": H, "v_head_dim": V, **fields}
    built = build(GatedDeltaNetConfig.model_validate({"type": "gated_deltanet", **sizes}))
    assert isinstance(built, GatedDeltaNet)
    return built


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors (weights or gradients) of transformers' layer, by our names.

    Its ``in_proj_qkvz`` holds, for each head of keys in turn, the rows of q, k, its heads' v and their gates;
    ``in_proj_ba`` likewise the rows of b and a.
    """
    group = N // K
    rows = theirs["in_proj_qkvz.weight"].unflatten(0, (K, -1)).split((H, H, group * V, group * V), dim=1)
    q, k, v, gate = (block.flatten(0, 1) for block in rows)
    b, a = (block.flatten(0, 1) for block in theirs["in_proj_ba.weight"].unflatten(0, (K, -1)).split(group, dim=1))
    return {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "gate_proj.weight": gate,
        "b_proj.weight": b,
        "a_proj.weight": a,
        "conv.weight": theirs["conv1d.weight"][:, 0],
        "fading.A_log": theirs["A_log"],
        "fading.dt_bias": theirs["dt_bias"],
        "head_norm.weight": theirs["norm.weight"],
        "o_proj.weight": theirs["out_proj.weight"],
    }


def pair() -> tuple[Qwen3NextGatedDeltaNet, GatedDeltaNet, Qwen3NextConfig]:
    """Transformers' layer and ours with the same random weights."""
    config = Qwen3NextConfig(
        hidden_size=24,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=K,
        linear_num_value_heads=N,
        linear_key_head_dim=H,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
    )
    theirs, ours = Qwen3NextGatedDeltaNet(config, 0).double(), part()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) + (parameter.dim() == 1))
        copied, mine = our_names(dict(theirs.named_parameters())), dict(ours.named_parameters())
        assert copied.keys() == mine.keys()
        for name, parameter in mine.items():
            parameter.copy_(copied[name])
    return theirs, ours, config


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, what
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), what


@pytest.mark.parametrize("T", [1, 9, 70])
def test_values_and_gradients_are_those_of_qwen3_next(T):
    theirs, ours, _ = pair()
    x, direction = torch.randn(2, 2, T, 24, dtype=torch.float64)
    wanted, y = theirs(x), ours(x, context(x)).y
    assert_close(y, wanted, "values")
    (wanted * direction).sum().backward()
    (y * direction).sum().backward()
    expected = our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, expected[name], f"gradient of {name}", 10 * TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("prefill", [2, 7])
def test_decoding_is_that_of_qwen3_next(prefill):
    theirs, ours, config = pair()
    x, cache = torch.randn(2, 12, 24, dtype=torch.float64), DynamicCache(config=config)
    sizes = [prefill] + [1] * (12 - prefill)
    wanted = [theirs(chunk, cache_params=cache) for chunk in x.split(sizes, dim=1)]
    assert_close(decoded(ours, x, sizes)[0], torch.cat(wanted, dim=1), "cached decoding")


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(kernels):
    built = part()
    built.kernels = kernels
    assert_documents_are_alone(built)


@settings(max_examples=15)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_equals_forward(sizes, packed):
    assert_decoding_equals_forward(part(), sizes, packed=packed)


def test_padding_leaves_the_memory_as_it_was():
    built = part()
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    _, padded = decoded(built, x, [4, 2], torch.tensor([[3, 3, 3, 3, 0, 0]]))
    _, before = decoded(built, x[:, :4], [4], torch.tensor([[3, 3, 3, 3]]))
    torch.testing.assert_close(padded.memory_BNHF, before.memory_BNHF)
    assert padded.segment_B.tolist() == before.segment_B.tolist() == [3]


def test_only_the_past_gets_a_gradient():
    x = torch.randn(1, 70, 24, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(part()(x, context(x)).y[0, 66].sum(), x)
    assert not grad[0, 67:].any()
    assert (grad[0, 50:67].abs().sum(-1) > 0).all()


def test_fading_starts_in_its_range():
    fading = part(num_v_heads=512).fading
    rate, step = fading.A_log.exp(), torch.nn.functional.softplus(fading.dt_bias)
    assert 0.01 <= rate.min() < 0.5
    assert 15.5 < rate.max() <= 16.0
    assert 0.00099 < step.min() < 0.0011
    assert 0.09 < step.max() <= 0.1001


def solve_flops(system_shape, sides_shape, *args, out_shape=None, **kwargs) -> int:
    """Half a square times the sides, multiply and add."""
    *batch, size, columns = sides_shape
    return torch.Size(batch).numel() * size * size * columns


def test_roles_cost_and_state():
    built = part()
    roles = parameter_roles(built)
    assert roles["fading.A_log"] == roles["fading.dt_bias"] == "scalar"
    assert roles["conv.weight"] == "conv"
    assert roles["head_norm.weight"] == "norm"
    assert {role for name, role in roles.items() if name.endswith("proj.weight")} == {"recurrence"}
    mapping = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    for T in (1, 20, 130):
        x = torch.randn(1, T, 24, dtype=torch.float64)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            built(x, context(x))
        assert counter.get_total_flops() == pytest.approx(T * built.flops_per_token(T), rel=1e-12)
    channels = 2 * K * H + N * V
    for length in (1, 9999):
        assert built.state_bytes(length, torch.bfloat16) == N * H * V * 4 + 3 * (channels * 2 + 8) + 8


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="no multiple of num_k_heads 2"):
        part(num_v_heads=3)
