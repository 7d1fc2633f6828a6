"""Our recurrences are flash-linear-attention's plain forms and mamba-ssm's, values, last states and gradients, in fp64.

Those of flash-linear-attention scale queries by H^-½, which is worked in here before ours see them, and hold heads in
front of positions where a ``heads_first`` says so. Both take logarithms of decays, and states as [B, N, k, values].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.bidirectional import bidirectional_sum, own_values
from graft.ops.decay_attention import decay_attention
from graft.ops.decay_attention_reference import parallel_decay_attention
from graft.ops.gated_delta_rule import gated_delta_rule
from graft.ops.gated_linear_attention import gated_linear_attention
from graft.ops.linear_scan import linear_scan

Kernels = Literal["auto", "reference"]
B, N, H, V = 2, 3, 5, 7
SCALE = H**-0.5
LENGTHS = [1, 13, 150]
"""One position; less than one of our chunks; more than two."""

KERNELS = ["auto", "reference"]
double = torch.float64


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=double)).requires_grad_()


def qkv(T: int) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(B, T, N, H), leaf(B, T, N, H, scale=0.5), leaf(B, T, N, V)


def log_decays(*shape: int) -> Tensor:
    """From weak to strong."""
    return -F.softplus(2.0 * torch.randn(shape, dtype=double)).requires_grad_()


def unit_keys(T: int) -> Tensor:
    return F.normalize(torch.randn(B, T, N, H, dtype=double), dim=-1).requires_grad_()


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def assert_same(
    ours: Callable[[], tuple[Tensor, ...]], theirs: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> None:
    """Results, and the gradients that random directions give every input."""
    actual, expected = ours(), theirs()
    directions = [torch.randn_like(y) for y in expected]
    gradients = [torch.autograd.grad(results, inputs, directions) for results in (actual, expected)]
    for a, b in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        scale = float(b.detach().abs().max())
        assert b.dtype == double
        assert scale > 1e-3, "nothing to compare"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("T", LENGTHS)
def test_gated_linear_attention(T: int, kernels: Kernels) -> None:
    q, k, v = qkv(T)
    g, state = log_decays(B, T, N, H), leaf(B, N, H, V)
    assert_same(
        lambda: gated_linear_attention(q * SCALE, k, v, g, state, kernels=kernels),
        lambda: oracles.fla("gla").naive_recurrent_gla(q, k, v, g, state, output_final_state=True),
        (q, k, v, g, state),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("T", LENGTHS)
def test_gated_delta_rule(T: int, form: str, kernels: Kernels) -> None:
    (q, _, v), k = qkv(T), unit_keys(T)
    g, state = log_decays(B, T, N), leaf(B, N, H, V)
    beta = torch.rand(B, T, N, dtype=double).requires_grad_()
    naive = getattr(oracles.fla("gated_delta_rule"), f"naive_{form}_gated_delta_rule")
    more = {"chunk_size": 16} if form == "chunk" else {}
    assert_same(
        lambda: gated_delta_rule(q * SCALE, k, v, g, beta, state, kernels=kernels),
        lambda: naive(q, k, v, beta=beta, g=g, initial_state=state, output_final_state=True, **more),
        (q, k, v, g, beta, state),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("T", LENGTHS[1:])
def test_gated_linear_attention_in_both_directions(T: int, kernels: Kernels) -> None:
    q, k, v = qkv(T)
    g = log_decays(B, T, N, H)

    def one_way(*given: Tensor) -> Tensor:
        return gated_linear_attention(*given[:-1], kernels=kernels)[0]

    assert_same(
        lambda: (bidirectional_sum(one_way, (q * SCALE, k, v, g)) - own_values(q * SCALE, k, v),),
        lambda: (oracles.both_directions(oracles.fla("gla").naive_recurrent_gla, q, k, v, g),),
        (q, k, v, g),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("T", LENGTHS[1:])
def test_gated_delta_rule_in_both_directions(T: int, kernels: Kernels) -> None:
    (q, _, v), k, g = qkv(T), unit_keys(T), log_decays(B, T, N)
    naive = oracles.fla("gated_delta_rule").naive_recurrent_gated_delta_rule
    beta = torch.rand(B, T, N, dtype=double).requires_grad_()

    def one_way(*given: Tensor) -> Tensor:
        return gated_delta_rule(*given[:-1], kernels=kernels)[0]

    assert_same(
        lambda: (
            bidirectional_sum(one_way, (q * SCALE, k, v, g, beta)) - beta[..., None] * own_values(q * SCALE, k, v),
        ),
        lambda: (oracles.both_directions(naive, q, k, v, beta, g),),
        (q, k, v, g, beta),
    )


@pytest.mark.parametrize("kernels", KERNELS)
def test_delta_rule_is_the_gated_one_without_decay(kernels: Kernels) -> None:
    T = 70
    (q, _, v), k = qkv(T), unit_keys(T)
    state, beta = leaf(B, N, H, V), torch.rand(B, T, N, dtype=double).requires_grad_()

    def theirs() -> tuple[Tensor, Tensor]:
        o, S = oracles.fla("delta_rule").delta_rule_recurrence(*heads_first(q, k, v, beta), initial_state=state)
        return o.transpose(1, 2), S

    assert_same(
        lambda: gated_delta_rule(q * SCALE, k, v, torch.zeros_like(beta), beta, state, kernels=kernels),
        theirs,
        (q, k, v, beta, state),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize("T", LENGTHS)
def test_decay_attention_with_a_decay_per_position(T: int, form: str, kernels: Kernels) -> None:
    q, k, v = qkv(T)
    g, state = log_decays(B, T, N), leaf(B, N, H, V)
    naive = getattr(oracles.fla("simple_gla"), f"naive_{form}_simple_gla")
    assert_same(
        lambda: decay_attention(q * SCALE, k, v, g, state_BNHF=state, kernels=kernels),
        lambda: naive(q, k, v, g, initial_state=state, output_final_state=True),
        (q, k, v, g, state),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("K", [1, 2, 4], ids=lambda K: f"groups{K}")
@pytest.mark.parametrize(
    ("T", "block_len", "chunk_size"), [(2, 1, 64), (12, 4, 5), (12, 12, 1), (36, 6, 6), (60, 10, 16), (130, 13, 64)]
)
@pytest.mark.parametrize("given_state", [True, False])
def test_decay_attention_is_the_scan_of_mamba2s_paper(
    T: int, block_len: int, chunk_size: int, K: int, given_state: bool, kernels: Kernels
) -> None:
    """B writes, C reads, per group of heads; theirs has a B and a C per head, and states as [B, 1, N, values, k]."""
    heads, x, log_decay = 4, leaf(B, T, 4, V), log_decays(B, T, 4)
    C_BTKH, B_BTKH = leaf(B, T, K, H), leaf(B, T, K, H, scale=0.5)
    state = leaf(B, heads, H, V) if given_state else None

    def theirs() -> tuple[Tensor, Tensor]:
        reads, writes = (y.repeat_interleave(heads // K, dim=2) for y in (C_BTKH, B_BTKH))
        first = None if state is None else state.mT[:, None]
        y, last = oracles.ssd_minimal()(x, log_decay, writes, reads, block_len, first)
        return y, last.mT

    assert_same(
        lambda: decay_attention(C_BTKH, B_BTKH, x, log_decay, state_BNHF=state, chunk_size=chunk_size, kernels=kernels),
        theirs,
        (C_BTKH, B_BTKH, x, log_decay, *([] if state is None else [state])),
    )


def test_all_pairs_at_once() -> None:
    T = 33
    q, k, v = qkv(T)
    g = log_decays(B, T, N)
    assert_same(
        lambda: (parallel_decay_attention(q * SCALE, k, v, g),),
        lambda: (oracles.fla("simple_gla").naive_parallel_simple_gla(q, k, v, g)[0],),
        (q, k, v, g),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("T", LENGTHS)
def test_retention(T: int, kernels: Kernels) -> None:
    """Head n forgets by 1 − 2^(−5 − n); no rotation, no normalisation."""
    q, k, v = qkv(T)
    log_decay = (1 - 2.0 ** (-5 - torch.arange(N, dtype=double))).log()[None, None]
    assert_same(
        lambda: decay_attention(q * SCALE, k, v, log_decay, kernels=kernels)[:1],
        lambda: (oracles.fla("retention").naive_retention(*heads_first(q, k, v)).transpose(1, 2),),
        (q, k, v),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("T", LENGTHS)
def test_linear_scan_is_hgrns_recurrence(T: int, kernels: Kernels) -> None:
    x, g, state = leaf(B, T, H), log_decays(B, T, H), leaf(B, H)

    def ours() -> tuple[Tensor, Tensor]:
        h = linear_scan(g.exp(), x, state, kernels=kernels)
        return h, h[:, -1]

    def theirs() -> tuple[Tensor, Tensor]:
        return oracles.fla("hgrn").naive_recurrent_hgrn(x, g, state, output_final_state=True)

    assert_same(ours, theirs, (x, g, state))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("T", LENGTHS[1:])
def test_linear_scan_in_both_directions_is_hgrns(T: int, kernels: Kernels) -> None:
    x, g = leaf(B, T, H), log_decays(B, T, H)

    def one_way(g: Tensor, x: Tensor, _: None) -> Tensor:
        return linear_scan(g.exp(), x, kernels=kernels)

    assert_same(
        lambda: (bidirectional_sum(one_way, (g, x)) - x,),
        lambda: (oracles.both_directions(oracles.fla("hgrn").naive_recurrent_hgrn, x, g),),
        (x, g),
    )
