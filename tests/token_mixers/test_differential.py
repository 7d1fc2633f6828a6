"""Differential attention: closed forms, its start, its state and its cost."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.config.model import InitConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.part import Context, Site, parameter_roles
from graft.positions.alibi import alibi_slopes
from graft.token_mixers.differential import Differential, initial_lambda
from graft.token_mixers.differential_config import DifferentialConfig

CPU = torch.device("cpu")
ROPE, ALIBI = {"type": "rope"}, {"type": "alibi"}


def differential(*, causal: bool = True, layer_idx: int = 1, dtype=torch.float64, **fields: Any) -> Differential:
    fields = {"num_heads": 4, "num_kv_heads": 2, "position": ROPE, **fields}
    config = DifferentialConfig.model_validate({"type": "differential", **fields})
    part = config.build(Site(24, layer_idx, 2, 4, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3)))
    initialize(part, seed=1)
    return part.to(dtype)


def context(x: Tensor, *, start: int = 0, segments: Tensor | None = None, causal: bool = True) -> Context:
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), positions, segments, causal)


def stream(T: int) -> Tensor:
    return torch.randn(2, T, 24, dtype=torch.float64)


def naive(part: Differential, x: Tensor, ctx: Context, window: int | None, slopes: list[float]) -> Tensor:
    """The definition, head by head of the paper: pair n is heads n and n + N/2."""
    q, k, v = part.project(x, ctx)
    T, N, K = x.shape[1], part.num_heads, part.num_kv_heads
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = ((j <= i) | (not ctx.causal)) & ((i - j).abs() < (window or T))
    q1, k1, q2, k2 = (getattr(part, f"lambda_{name}") for name in ("q1", "k1", "q2", "k2"))
    factor = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + part.lambda_init
    heads: list[Tensor] = []
    for n in range(N // 2):
        group = n // (N // K)
        values = torch.cat((v[:, :, group], v[:, :, group + K // 2]), dim=-1)
        maps = []
        for head, keys in ((n, group), (n + N // 2, group + K // 2)):
            scores = q[:, :, head] @ k[:, :, keys].transpose(1, 2) / part.head_dim**0.5 - slopes[n] * (i - j).abs()
            maps.append(scores.masked_fill(~seen, -math.inf).softmax(-1))
        o = (maps[0] - factor * maps[1]) @ values
        heads.append((1 - part.lambda_init) * o / (o.square().mean(-1, keepdim=True) + part.head_norm_eps).sqrt())
    return part.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv", "position"), [(4, 2, ROPE), (8, 4, ALIBI), (4, 4, {"type": "none"})])
def test_the_definition_written_out_gives_the_same_values_and_gradients(causal, window, heads, kv, position):
    part = differential(
        causal=causal, num_heads=heads, num_kv_heads=kv, head_dim=6, sliding_window=window, position=position
    )
    slopes = alibi_slopes(heads // 2) if position is ALIBI else [0.0] * heads
    x = stream(9).requires_grad_()
    ctx = context(x, causal=causal)
    pair = (part(x, ctx).y, naive(part, x, ctx, window, slopes))
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)
    learned = list(part.parameters())
    direction = torch.randn_like(x)
    gradients = (torch.autograd.grad((y * direction).sum(), [x, *learned]) for y in pair)
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)


@settings(max_examples=25)
@given(
    cuts=st.sets(st.integers(1, 10)),
    window=st.sampled_from([None, 1, 4, 11, 30]),
    position=st.sampled_from([ROPE, ALIBI]),
)
def test_decoding_in_any_chunks_equals_the_full_forward(cuts, window, position):
    part, x = differential(sliding_window=window, position=position), stream(11)
    segments = torch.tensor([[0, 0, 5, 5, 5, 5, 2, 2, 2, 2, 2], [4] * 11])
    with torch.no_grad():
        whole = part(x, context(x, segments=segments)).y
        state, pieces = part.init_state(2, 11, device=CPU, dtype=x.dtype), []
        for start, end in itertools.pairwise([0, *sorted(cuts), 11]):
            out = part(x[:, start:end], context(x[:, start:end], start=start, segments=segments[:, start:end]), state)
            state = out.state
            pieces.append(out.y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-11)


def test_lambda_of_layers_and_its_start():
    assert initial_lambda(0) == pytest.approx(0.2)
    assert initial_lambda(100) == pytest.approx(0.8)
    part = differential(layer_idx=3, lambda_std=0.1, head_dim=64)
    assert part.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.9))
    vectors = torch.cat([p.detach() for n, p in part.named_parameters() if "lambda" in n])
    assert vectors.std().item() == pytest.approx(0.1, rel=0.15)
    with torch.no_grad():
        for name in ("q1", "k1", "q2", "k2"):
            getattr(part, f"lambda_{name}").zero_()
    assert part.lambda_now().item() == pytest.approx(part.lambda_init)


def test_equal_maps_cancel_when_lambda_is_one():
    part, x = differential(position={"type": "none"}), stream(5)
    with torch.no_grad():
        for projection in (part.q_proj, part.k_proj):
            projection.weight.zero_()
        part.lambda_q1.zero_()
        part.lambda_q2.zero_()
    part.lambda_init = 1.0
    assert part(x, context(x)).y.abs().max() == 0


def test_the_difference_is_taken_in_fp32_under_bf16():
    part = differential(dtype=torch.bfloat16)
    first = torch.full((1, 1, 2, 12), 1.0, dtype=torch.bfloat16)
    part.lambda_now = lambda: torch.tensor(0.999)
    out = part._normed(first, first)
    assert out.dtype == torch.bfloat16
    wanted = (1 - part.lambda_init) * 0.001 / math.sqrt(0.001**2 + part.head_norm_eps)
    assert out[0, 0, 0, 0].item() == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("window", [None, 6])
def test_counted_flops_are_those_of_decoding(window):
    part, T = differential(sliding_window=window), 14
    state = part.init_state(2, T, device=CPU, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        for t in range(T):
            x = stream(1)
            state = part(x, context(x, start=t), state).state
    assert counter.get_total_flops() == pytest.approx(2 * T * part.flops_per_token(T), rel=1e-12)


def test_state_bytes_are_those_of_keys_and_values():
    assert differential().state_bytes(100, torch.float32) == 100 * 2 * 2 * 6 * 4
    assert differential(sliding_window=8).state_bytes(100, torch.float32) == 8 * 2 * 2 * 6 * 4


def test_roles():
    roles = parameter_roles(differential())
    assert {roles[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2")} == {"scalar"}
    assert {role for name, role in roles.items() if "proj" in name} == {"attention"}


@pytest.mark.parametrize(("heads", "kv", "field"), [(3, None, "num_heads"), (4, 1, "num_kv_heads")])
def test_heads_that_cannot_be_paired_are_a_problem(heads, kv, field):
    with pytest.raises(ValidationError, match="cannot be paired") as raised:
        differential(num_heads=heads, num_kv_heads=kv)
    assert raised.value.errors()[0]["ctx"]["problems"][0].path == (field,)
