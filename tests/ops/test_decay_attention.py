"""Attention with decay: its three forms against each other and against what a document computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from graft.ops.decay_attention import (
    bidirectional_decay_attention,
    chunked_decay_attention,
    chunked_flops,
    decay_attention,
)
from graft.ops.decay_attention_reference import parallel_decay_attention, recurrent_decay_attention
from graft.ops.documents import find_documents

DOUBLE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}


def inputs(B=2, T=13, K=2, N=4, H=3, F=5, *, dtype=torch.float64, constant=False):
    """q, k, v and log decays, all of which want gradients."""
    shape = (1, 1, N) if constant else (B, T, N)
    tensors = [torch.randn(B, T, K, H), torch.randn(B, T, K, H), torch.randn(B, T, N, F), -torch.rand(shape) * 2]
    return [t.to(dtype).requires_grad_() for t in tensors]


def gradients(y, tensors):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in y]
    total = torch.stack([(a * w).sum() for a, w in zip(y, weights, strict=True)]).sum()
    return torch.autograd.grad(total, tensors, retain_graph=True)


def assert_same(actual, expected, tensors, **tolerance):
    """Equal outputs and equal gradients."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


SEGMENTS = {
    "one document": None,
    "packed": [[1] * 4 + [2] * 5 + [7] * 4, [3] * 12 + [9]],
    "padded": [[0, 0, 0] + [1] * 10, [5] * 6 + [0] * 3 + [2] * 4],
    "short": [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4], [0] * 13],
}


def documents(segments, **before):
    return None if segments is None else find_documents(torch.tensor(segments), **before)


def real(y, segments):
    """The outputs that mean something."""
    return y if segments is None else y.masked_fill((torch.tensor(segments) == 0)[..., None, None], 0.0)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 64])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_three_forms_are_equal_in_values_and_gradients(segments, chunk_size, constant):
    tensors, found = inputs(constant=constant), documents(segments)
    y, state = chunked_decay_attention(*tensors, documents=found, chunk_size=chunk_size)
    again, last = recurrent_decay_attention(*tensors, documents=found)
    pairs = parallel_decay_attention(*tensors, documents=found)
    y, again, pairs = (real(x, segments) for x in (y, again, pairs))
    assert_same((y, state), (again, last), tensors, **DOUBLE)
    assert_same((y,), (pairs,), tensors, **DOUBLE)


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_a_document_of_a_packed_row_computes_what_it_does_alone(chunk_size):
    q, k, v, g = inputs(1, 12)
    segments = torch.tensor([[0, 0, 4, 4, 4, 4, 4, 2, 2, 2, 0, 0]])
    packed, state = chunked_decay_attention(q, k, v, g, documents=find_documents(segments), chunk_size=chunk_size)
    for now in (slice(2, 7), slice(7, 10)):
        alone, last = recurrent_decay_attention(*(x[:, now] for x in (q, k, v, g)))
        torch.testing.assert_close(packed[:, now], alone, **DOUBLE)
    torch.testing.assert_close(state, last, **DOUBLE)


@settings(max_examples=40)
@given(cut=st.integers(1, 12), chunk_size=st.sampled_from([3, 64]), case=st.sampled_from(sorted(SEGMENTS)))
def test_a_row_in_two_calls_equals_one(cut, chunk_size, case):
    tensors, segments = inputs(), SEGMENTS[case]
    whole, last = chunked_decay_attention(*tensors, documents=documents(segments), chunk_size=chunk_size)
    pieces, state, before = [], None, {}
    for now in (slice(0, cut), slice(cut, 13)):
        found = None
        if segments is not None:
            found = find_documents(torch.tensor(segments)[:, now], **before)
            before = {"segment_B": found.segment_B, "count_B": found.count_B}
        piece = [x[:, now] for x in tensors]
        y, state = decay_attention(*piece, documents=found, state_BNHF=state, chunk_size=chunk_size)
        pieces.append(y)
    assert_same(
        (real(torch.cat(pieces, 1), segments), state), (real(whole, segments), last), tensors, rtol=1e-9, atol=1e-10
    )


def test_closed_form_of_constant_inputs():
    """With q = k = v = 1 the output is the geometric series of the factor."""
    ones = torch.ones(1, 50, 1, 1, dtype=torch.float64)
    decay = torch.tensor([[[0.9]]], dtype=torch.float64)
    y, state = chunked_decay_attention(ones, ones, ones, decay.log(), chunk_size=8)
    series = (1 - 0.9 ** torch.arange(1, 51, dtype=torch.float64)) / 0.1
    torch.testing.assert_close(y.flatten(), series, **DOUBLE)
    torch.testing.assert_close(state.flatten(), series[-1:], **DOUBLE)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("segments", [None, [[1] * 4 + [2] * 5 + [0] * 4, [0] * 2 + [3] * 11]])
def test_both_directions_fade_by_the_distance(segments, kernels):
    q, k, v, g = tensors = inputs(constant=True)
    given_ids = None if segments is None else torch.tensor(segments)
    y = bidirectional_decay_attention(*tensors, segment_ids_BT=given_ids, chunk_size=4, kernels=kernels)
    index = torch.arange(13, dtype=torch.float64)
    weights = (g.view(-1, 1, 1) * (index[:, None] - index).abs()).exp()[None]
    if given_ids is not None:
        seen = (given_ids[:, :, None] == given_ids[:, None, :]) & (given_ids[:, None, :] != 0)
        weights = weights * seen[:, None]
    scores = torch.einsum("btkh,bskh->bkts", q, k).repeat_interleave(2, dim=1)
    wanted = torch.einsum("bnts,bsnf->btnf", scores * weights, v)
    assert_same((real(y, segments),), (real(wanted, segments),), tensors, **DOUBLE)


def test_factors_that_vary_going_back():
    """Position n sees a later m faded by the factors of n … m − 1."""
    q, k, v, g = inputs(1, 5, 1, 1, 1, 1)
    y = bidirectional_decay_attention(q, k, v, g, chunk_size=2)
    wanted = torch.zeros(5, dtype=torch.float64)
    for n in range(5):
        for m in range(5):
            faded = g[0, m + 1 : n + 1].sum() if m <= n else g[0, n:m].sum()
            wanted[n] = wanted[n] + (faded.exp() * q[0, n] * k[0, m] * v[0, m]).sum()
    torch.testing.assert_close(y.flatten(), wanted, **DOUBLE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precision_stays_near(dtype, tolerance):
    exact = inputs(1, 200, 1, 2, 8, 8)
    tensors = [x.detach().to(dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(exact)]
    y, state = chunked_decay_attention(*tensors)
    wanted, last = recurrent_decay_attention(*exact)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    outputs, expected = (y, state), (wanted, last)
    pairs = zip([*outputs, *gradients(outputs, tensors)], [*expected, *gradients(expected, exact)], strict=True)
    for a, b in pairs:
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_long_and_strong_decays_stay_finite():
    """Over a chunk the factors fall to e^−1000 and the differences above the diagonal rise to e^1000."""
    q, k, v, g = tensors = inputs(1, 128, 1, 1, 2, 2, dtype=torch.float32)
    g = g * 0 - 16.0
    y, state = chunked_decay_attention(q, k, v, g, documents=find_documents(torch.ones(1, 128, dtype=torch.int64)))
    assert all(x.isfinite().all() for x in (y, state, *gradients((y, state), tensors)))


@pytest.mark.parametrize(("T", "size"), [(64, 16), (50, 16), (5, 16)])
def test_counted_flops_are_those_of_the_chunked_form(T, size):
    tensors = [x.detach() for x in inputs(3, T, 2, 4, 8, 6, dtype=torch.float32)]
    with FlopCounterMode(display=False) as counter:
        chunked_decay_attention(*tensors, chunk_size=size)
    counted = chunked_flops(T, num_groups=2, num_heads=4, head_dim=8, value_dim=6, size=size)
    assert counter.get_total_flops() == pytest.approx(3 * T * counted, rel=1e-12)


def test_cost_is_linear_in_the_length():
    short, long = (chunked_flops(T, num_groups=1, num_heads=2, head_dim=8, value_dim=8, size=64) for T in (512, 8192))
    assert short == long


@pytest.mark.slow
def test_it_compiles_to_one_graph(compiling):
    tensors, found = inputs(T=12), documents([[1] * 5 + [2] * 7, [0] * 3 + [1] * 9])
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(chunked_decay_attention, backend=counter, fullgraph=True)
    compiled = run(*tensors, documents=found, chunk_size=4)
    assert counter.frame_count == 1
    assert_same(compiled, chunked_decay_attention(*tensors, documents=found, chunk_size=4), tensors, **DOUBLE)


class TestDocuments:
    def test_borders_padding_and_counts(self):
        found = find_documents(torch.tensor([[0, 8, 8, 0, 8, 3, 0, 0], [2, 2, 1, 1, 1, 2, 2, 2]]))
        assert found.real_BT[0].tolist() == [False, True, True, False, True, True, False, False]
        assert found.run_BT.tolist() == [[0, 1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 3, 3, 3]]
        assert [found.index_BT[0, t].item() for t in (1, 2, 4, 5)] == [0, 1, 2, 0]
        assert found.index_BT[1].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
        assert found.segment_B.tolist() == [3, 2]
        assert found.count_B.tolist() == [1, 3]

    def test_a_document_goes_on(self):
        before = {"segment_B": torch.tensor([4, 4]), "count_B": torch.tensor([10, 10])}
        found = find_documents(torch.tensor([[0, 4, 5], [5, 5, 5]]), **before)
        assert found.run_BT.tolist() == [[0, 0, 1], [1, 1, 1]]
        assert found.index_BT[:, 1:].tolist() == [[10, 0], [1, 2]]
        assert found.count_B.tolist() == [1, 3]

    def test_padding_alone_changes_nothing(self):
        found = find_documents(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([4]), torch.tensor([7]))
        assert found.segment_B.item() == 4
        assert found.count_B.item() == 7
        assert not found.run_BT.any()
