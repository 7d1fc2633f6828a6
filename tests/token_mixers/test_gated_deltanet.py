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
    states_around_padding,
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


def part(*, causal: bool = True, **fields) -> GatedDeltaNet:
    sizes = {"num_k_heads": K, "num_v_heads": N, "head_dim": H, "v_head_dim": V, **fields}
    built = build(GatedDeltaNetConfig.model_validate({"type": "gated_deltanet", **sizes}), causal=causal)
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


def encoded(names: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """An encoder's layer for one document: every head, direction and token by itself.

    Each way fades its memory and takes from it what the key finds; what the way back has then left is read before the
    value is written, since the way there has the value already.
    """
    projected = torch.cat([x_TD @ names[f"{name}_proj.weight"].mT for name in "qkv"], dim=-1)
    padded = torch.nn.functional.pad(projected, (0, 0, 2, 1))  # of four taps the third is the position's own
    mixed = sum(padded[i : i + len(x_TD)] * names["conv.weight"][:, i] for i in range(4))
    q, k, v = torch.nn.functional.silu(torch.as_tensor(mixed)).split((K * H, K * H, N * V), dim=-1)
    heads = []
    for n in range(N):
        key = slice(n // (N // K) * H, (n // (N // K) + 1) * H)
        value = slice(n * V, (n + 1) * V)
        read = [torch.zeros(V, dtype=x_TD.dtype)] * len(x_TD)
        for back in (False, True):
            memory = torch.zeros(H, V, dtype=x_TD.dtype)
            for t in reversed(range(len(x_TD))) if back else range(len(x_TD)):
                q_t, k_t = (z[t, key] / (z[t, key].square().sum() + 1e-6).sqrt() for z in (q, k))
                share = torch.sigmoid(names["b_proj.weight"][n] @ x_TD[t])
                step = torch.log1p((names["a_proj.weight"][n] @ x_TD[t] + names["fading.dt_bias"][n]).exp())
                faded = (-names["fading.A_log"][n].exp() * step).exp() * memory
                corrected = faded - share * torch.outer(k_t, faded.mT @ k_t)
                memory = corrected + share * torch.outer(k_t, v[t, value])
                read[t] = read[t] + (corrected if back else memory).mT @ q_t / H**0.5
        gates = torch.nn.functional.silu(x_TD @ names["gate_proj.weight"][value].mT)
        o = torch.stack(read)
        heads.append(o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * names["head_norm.weight"] * gates)
    return torch.cat(heads, -1) @ names["o_proj.weight"].mT


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("T", [1, 9, 70])
def test_values_and_gradients_of_an_encoder_are_those_of_its_two_ways(T, kernels):
    built = part(causal=False)
    built.kernels = kernels
    names = dict(built.named_parameters())
    x, direction = torch.randn(2, 2, T, 24, dtype=torch.float64)
    wanted, y = torch.stack([encoded(names, row) for row in x]), built(x, context(x, causal=False)).y
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-10)
    results = [torch.autograd.grad((z * direction).sum(), list(names.values())) for z in (y, wanted)]
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(kernels, causal):
    built = part(causal=causal)
    built.kernels = kernels
    assert_documents_are_alone(built, causal=causal)


def test_an_encoder_reads_a_token_alone_as_a_decoder_does():
    built = [part(causal=causal, kernel_size=1) for causal in (True, False)]
    x = torch.randn(4, 1, 24, dtype=torch.float64)
    torch.testing.assert_close(*(one(x, context(x, causal=one.causal)).y for one in built))


@settings(max_examples=15)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_equals_forward(sizes, packed):
    assert_decoding_equals_forward(part(), sizes, packed=packed)


def test_padding_leaves_the_memory_as_it_was():
    before, padded = states_around_padding(part())
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


@pytest.mark.parametrize("causal", [True, False])
def test_counted_flops_are_those_of_the_forward(causal):
    built, mapping = part(causal=causal), {torch.ops.aten.linalg_solve_triangular: solve_flops}
    for T in (1, 20, 130):
        x = torch.randn(1, T, 24, dtype=torch.float64)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            built(x, context(x, causal=causal))
        assert counter.get_total_flops() == pytest.approx(T * built.flops_per_token(T), rel=1e-12)


def test_roles_and_state():
    built = part()
    roles = parameter_roles(built)
    assert roles["fading.A_log"] == roles["fading.dt_bias"] == "scalar"
    assert roles["conv.weight"] == "conv"
    assert roles["head_norm.weight"] == "norm"
    assert {role for name, role in roles.items() if name.endswith("proj.weight")} == {"recurrence"}
    channels = 2 * K * H + N * V
    for length in (1, 9999):
        assert built.state_bytes(length, torch.bfloat16) == N * H * V * 4 + 3 * (channels * 2 + 8) + 8


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="no multiple of num_k_heads 2"):
        part(num_v_heads=3)
