"""Products that fade with distance: the tiles, and every attention kernel that uses them, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.ops import attention_banded, decayed_products
from graft.ops.attention import SDPA_FROM, attention, choose_form
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.kernels import Kernels

RATES = torch.tensor([40.0, 2.0, 0.7, 0.1, 0.01, 0.0])


def inputs(T, S=None, *, B=2, N=4, K=2, dtype=torch.float64, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    H = len(RATES)
    shapes = [(B, T, N, H), (B, S or T, K, H), (B, S or T, K, H)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def values_and_gradients(
    qkv: list[Tensor], visibility: Visibility, scoring: Scoring, kernels: Kernels = "auto"
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attention(*leaves, visibility, scoring, kernels=kernels)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@settings(max_examples=100)
@given(st.integers(-5, 40), st.integers(0, 50), st.integers(0, 9), st.integers(0, 60), st.booleans())
def test_tiles_cover_each_pair_once(first_query, num_queries, first_key, num_keys, causal):
    queries, keys = range(first_query, first_query + num_queries), range(first_key, first_key + num_keys)
    covered = [
        (i, j)
        for tile in decayed_products.tiles(queries, keys, causal=causal)
        for i in tile.queries
        for j in tile.keys
        if tile.pivot is None or min(i, j) <= tile.pivot <= max(i, j)
    ]
    assert len(covered) == len(set(covered))
    needed = {(i, j) for i in queries for j in keys if not causal or j <= i}
    assert needed <= set(covered) <= {(i, j) for i in queries for j in keys}


def test_the_definition_is_the_sum_over_channels():
    q, k, _ = (x.detach() for x in inputs(9, 9, B=1, N=1, K=1))
    away = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    wanted = sum(q[0, :, 0, c, None] * k[0, None, :, 0, c] * torch.exp(-r * away) for c, r in enumerate(RATES.double()))
    fast = decayed_products.decayed_products(q[:, :, 0], k[:, :, 0], RATES, 1, 0, 0, False)
    torch.testing.assert_close(fast[0], wanted, rtol=1e-10, atol=1e-12)
    eye = torch.eye(9, dtype=torch.float64).view(1, 9, 1, 9)
    p = attention(q, k, eye, Visibility(causal=False), Scoring(1.0, rates_H=RATES), kernels="reference")
    torch.testing.assert_close(p[0, :, 0], torch.softmax(wanted, dim=-1), rtol=1e-10, atol=1e-12)


@st.composite
def problems(draw):
    T = draw(st.integers(1, 23))
    S = T + draw(st.integers(0, 9))
    segments = None
    if draw(st.booleans()):
        cuts = torch.rand(2, S, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.15
        segments = torch.where(torch.arange(S) < draw(st.integers(0, 4)), 0, cuts.cumsum(1) + 1)
    queries = None if segments is None else segments[:, S - T :]
    slopes = draw(st.sampled_from([None, torch.linspace(0.1, 0.9, 4)]))
    visibility = Visibility(draw(st.booleans()), draw(st.none() | st.integers(1, S + 1)), S - T, queries, segments)
    return (T, S), visibility, Scoring(0.4, draw(st.sampled_from([None, 2.0])), slopes, RATES)


@pytest.mark.parametrize("kernel", ["folded", "banded"])
@settings(max_examples=25)
@given(problem=problems())
def test_fast_kernels_equal_the_definition_in_values_and_gradients(kernel, problem):
    (T, S), visibility, scoring = problem
    qkv = inputs(T, S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decayed_products, "NEAR", 2)
        patch.setattr(attention_banded, "BLOCK", 8)
        patch.setattr("graft.ops.attention.FOLDED_BELOW", 1 if kernel == "banded" else 10**6)
        patch.setattr("graft.ops.attention.BLOCK", 10**6)
        fast = values_and_gradients(qkv, visibility, scoring)
    plain = values_and_gradients(qkv, visibility, scoring, "reference")
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("causal", [True, False])
def test_training_dtypes_at_the_real_block_sizes(dtype, tolerance, causal):
    qkv = inputs(541, B=1, dtype=dtype)
    asked = (Visibility(causal), Scoring(0.4, rates_H=RATES))
    fast = values_and_gradients(qkv, *asked)
    plain = values_and_gradients([x.double() for x in qkv], *asked, "reference")
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs().max() / b.abs().max()) < tolerance


def test_rates_are_never_dropped_by_the_choice_of_form():
    q = torch.empty(1, SDPA_FROM, 2, 6, device="meta")
    assert choose_form(q, q, Visibility(causal=True), Scoring(1.0)) == "sdpa"
    assert choose_form(q, q, Visibility(causal=True), Scoring(1.0, rates_H=RATES)) == "banded"


def test_memory_is_linear_in_the_length():
    """Far tiles make nothing larger than their operands, near tiles NEAR keys per query."""
    largest = []
    for T in (256, 512):
        q = torch.randn(1, T, 6)
        sizes = [
            parts.k.numel() + parts.q.numel()
            for tile in decayed_products.tiles(range(T), range(T), causal=True)
            for parts in [decayed_products._operands(q[:, : len(tile.queries)], q[:, : len(tile.keys)], tile, RATES)]
        ]
        largest.append(max(sizes))
    near = decayed_products.NEAR
    assert largest == [max(256 * 6, near * 6 * (near + 1)), max(512 * 6, near * 6 * (near + 1))]


def test_the_flop_counter_sees_what_tiles_compute():
    q, k = torch.randn(3, 40, 6, requires_grad=True), torch.randn(3, 20, 6, requires_grad=True)
    pairs = sum(len(t.queries) * len(t.keys) for t in decayed_products.tiles(range(20), range(20), causal=True))
    assert 20 * 21 / 2 <= pairs < 20 * 20
    with FlopCounterMode(display=False) as forward:
        out = decayed_products.decayed_products(q, k, RATES, 2, 0, 0, True)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 2 * 6 * pairs
    assert backward.get_total_flops() == 2 * 2 * 3 * 2 * 6 * pairs


def test_the_operator_keeps_its_promises_to_the_compiler():
    q, k = torch.randn(2, 18, 6, requires_grad=True), torch.randn(2, 11, 6, requires_grad=True)
    torch.library.opcheck(decayed_products.decayed_products, (q, k, RATES, 2, 2, 0, True))
