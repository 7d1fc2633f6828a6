"""The neural memory: its chunked form against the recurrence, autograd's gradients, and closed forms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from graft.ops.documents import find_documents
from graft.ops.neural_memory import scan
from graft.ops.neural_memory_chunk import Base, Memory, Writing, surprise
from graft.ops.neural_memory_reference import plain_read

B, N, H, W = 2, 3, 4, 5  # W: channels between the layers


def weights(depth: int, rows: int = 1, dtype=torch.float64, width: int = W):
    sizes = [H, *[width] * (depth - 1), H]
    return tuple(torch.randn(rows, N, i, o, dtype=dtype) / i**0.5 for i, o in pairwise(sizes))


def still(start) -> Memory:
    """The memory before anything."""
    rows = tuple(w.expand(B, -1, -1, -1) for w in start)
    return Memory(rows, tuple(torch.zeros_like(w) for w in rows), rows)


def writing(T: int, dtype=torch.float64) -> Writing:
    q, k, v = (torch.randn(B, N, T, H, dtype=dtype) for _ in range(3))
    step, eta, keep = (torch.randn(B, N, T, dtype=dtype) for _ in range(3))
    return Writing(q, F.normalize(k, dim=-1), v, step.sigmoid() * 0.2, F.logsigmoid(eta), F.logsigmoid(keep + 2))


def pieces(w: Writing, first: int, last: int) -> Writing:
    return Writing(*(x[:, :, first:last] for x in w))


def run(w: Writing, start, segments=None, *, chunk=4, kernels: Any = "auto", memory=None, documents=None, most=None):
    T = w.k_BNCH.shape[2]
    if segments is not None:
        documents = find_documents(segments)
    return scan(
        lambda _, first, last: pieces(w, first, last),
        still(start) if memory is None else memory,
        start,
        documents,
        length=T,
        chunk_size=chunk,
        max_surprise=most,
        kernels=kernels,
    )


def leaves(w: Writing, start):
    return [x.requires_grad_() for x in (*w, *start)]


ROWS = torch.tensor(
    [
        [7, 7, 7, 7, 7, 7, 3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 2, 2],
        [0, 0, 5, 5, 5, 0, 0, 5, 5, 5, 5, 8, 8, 8, 8, 8, 8, 8, 0],
    ]
)
"""Documents of all lengths around chunks of 4, with padding before, after, and inside one."""


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [None, 1.5])
def test_chunks_equal_the_recurrence_in_values_gradients_and_memory(depth, packed, most):
    T = ROWS.shape[1]
    start, w = weights(depth), writing(T)
    x = leaves(w, start)
    results = []
    for kernels in ("auto", "reference"):
        segments = ROWS if packed else (None if kernels == "auto" else torch.ones(B, T, dtype=torch.int64))
        y, memory = run(w, start, segments, kernels=kernels, most=most)
        real = (ROWS != 0)[:, None, :, None] if packed else torch.ones(B, 1, T, 1, dtype=torch.bool)
        y = torch.where(real, y, 0.0)
        loss = (y.sin()).sum() + sum(m.cos().sum() for m in (*memory.weights, *memory.momentum))
        results.append((y, *memory.weights, *memory.momentum, *torch.autograd.grad(loss, x)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_rounding_grows_with_the_dtype_alone(dtype, tolerance):
    w, start = writing(24), weights(2)
    exact = run(w, start)[0]
    rounded = run(Writing(*(x.to(dtype) for x in w)), tuple(x.to(dtype) for x in start), chunk=4)[0]
    assert rounded.dtype == dtype
    assert (rounded - exact).abs().max() < tolerance * exact.abs().max()


def test_autocast_does_not_reach_the_memory():
    w, start = writing(9, torch.float32), weights(2, dtype=torch.float32)
    plain, packed = run(w, start)[0], run(w, start, ROWS[:, :9])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(w, start)[0], plain)
        assert torch.equal(run(w, start, ROWS[:, :9])[0], packed)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_surprise_is_autograds_gradient_of_the_associative_loss(depth):
    rows, w = weights(depth, B), writing(6)
    found = surprise((Base(rows, None),), w.k_BNCH, w.v_BNCH)

    def loss(parameters, k, v):
        return (plain_read(parameters, k) - v).square().sum()

    each = vmap(vmap(vmap(grad(loss), (None, 0, 0)), 0), 0)(rows, w.k_BNCH, w.v_BNCH)
    for a, delta, wanted in zip(*found, each, strict=True):
        torch.testing.assert_close(a[..., :, None] * delta[..., None, :], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_long_gradients_are_shortened_and_short_ones_are_not(depth):
    rows, w = weights(depth, B), writing(30)
    plain, short = (surprise((Base(rows, None),), w.k_BNCH, w.v_BNCH, most) for most in (None, 4.0))
    found, wanted = (
        torch.cat([(a[..., :, None] * delta[..., None, :]).flatten(-2) for a, delta in zip(*s, strict=True)], -1)
        for s in (short, plain)
    )
    lengths = wanted.norm(dim=-1, keepdim=True)
    assert (lengths > 4).any()
    assert (lengths < 4).any()
    torch.testing.assert_close(found, wanted * (4 / lengths).clamp_max(1))


def by_equations(w: Writing, start, chunk: int):
    """Equations 13-14 with the chunk's gradients of equation 16: loops over everything, gradients by autograd."""
    B_, N_, T, _ = w.k_BNCH.shape
    out = torch.zeros_like(w.v_BNCH)
    for b in range(B_):
        for n in range(N_):
            memory = [x[0, n].detach().clone() for x in start]
            momentum, base = [torch.zeros_like(m) for m in memory], memory
            for t in range(T):
                if t % chunk == 0:
                    base = [m.clone() for m in memory]
                at = [m.clone().requires_grad_() for m in base]
                loss = (plain_read(tuple(at), w.k_BNCH[b, n, t][None]) - w.v_BNCH[b, n, t]).square().sum()
                eta, theta = w.log_momentum_BNC[b, n, t].exp(), w.step_BNC[b, n, t]
                alpha = 1 - w.log_keep_BNC[b, n, t].exp()
                pushed = torch.autograd.grad(loss, at)
                momentum = [eta * s - theta * g for s, g in zip(momentum, pushed, strict=True)]
                memory = [(1 - alpha) * m + s for m, s in zip(memory, momentum, strict=True)]
                out[b, n, t] = plain_read(tuple(memory), w.q_BNCH[b, n, t][None])[0]
    return out


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("depth", [1, 2])
def test_it_is_the_papers_recurrence(depth, chunk):
    w, start = writing(10), weights(depth)
    torch.testing.assert_close(run(w, start, chunk=chunk)[0], by_equations(w, start, chunk), rtol=1e-10, atol=1e-11)


def test_a_linear_memory_without_momentum_in_chunks_of_one_is_the_gated_delta_rule():
    T = 7
    w, start = writing(T), weights(1)
    w = w._replace(log_momentum_BNC=torch.full((B, N, T), -300.0, dtype=torch.float64))
    fast = run(w, start, chunk=1)[1].weights[0]
    M = start[0].expand(B, -1, -1, -1)
    eye = torch.eye(H, dtype=torch.float64)
    for t in range(T):
        k, v = w.k_BNCH[:, :, t, :, None], w.v_BNCH[:, :, t, None, :]
        twice, keep = 2 * w.step_BNC[:, :, t, None, None], w.log_keep_BNC[:, :, t, None, None].exp()
        M = (keep * eye - twice * k @ k.mT) @ M + twice * k @ v
    torch.testing.assert_close(fast, M, rtol=1e-11, atol=1e-12)


def test_one_key_with_the_right_step_is_recalled_exactly():
    """A unit key and θ = 1/2: after the step the key reads its value, whatever the memory was."""
    w, start = writing(1), weights(1)
    zero, none = torch.zeros(B, N, 1, dtype=torch.float64), torch.full((B, N, 1), -300.0, dtype=torch.float64)
    w = w._replace(q_BNCH=w.k_BNCH, step_BNC=zero + 0.5, log_keep_BNC=zero, log_momentum_BNC=none)
    torch.testing.assert_close(run(w, start)[0], w.v_BNCH, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [[19], [1] * 19, [5, 1, 3, 1, 6, 3], [4, 4, 4, 4, 3]])
def test_in_any_pieces(cuts):
    w, start = writing(19), weights(2)
    whole, end = run(w, start, ROWS)
    memory, segment, count, out, first = still(start), None, None, [], 0
    for size in cuts:
        now = slice(first, first + size)
        documents = find_documents(ROWS[:, now], segment, count)
        y, memory = run(pieces(w, first, first + size), start, memory=memory, documents=documents)
        out.append(y)
        segment, count, first = documents.segment_B, documents.count_B, first + size
    torch.testing.assert_close(torch.cat(out, dim=2), whole, rtol=1e-10, atol=1e-11)
    for a, b in zip((*memory.weights, *memory.momentum), (*end.weights, *end.momentum), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
