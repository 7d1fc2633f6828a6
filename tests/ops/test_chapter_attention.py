"""Attention to chosen chapters: the grouped form against the definition and PyTorch's own attention, and its layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.ops.chapter_attention import BLOCKS_PER_CHAPTER, blocks_of, chapter_attention

N, H = 2, 4


def draw(T: int, E: int, M: int, C: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(*shape, N, H, dtype=dtype, requires_grad=True) for shape in ((T,), (E, M), (E, M)))
    weights = torch.rand(T, C, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return q, k, v, torch.rand(T, E).argsort(1)[:, :C], weights


def by_position(q: Tensor, k: Tensor, v: Tensor, chapters: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Position by position with PyTorch's attention."""
    rows = []
    for t in range(q.shape[0]):
        row = torch.zeros(N, H, dtype=q.dtype)
        for c, weight in zip(chapters[t], weights[t], strict=True):
            keys, values = (x[c].transpose(0, 1) for x in (k, v))
            row = row + weight * F.scaled_dot_product_attention(q[t][:, None], keys, values, scale=scale)[:, 0]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("T", "E", "M", "C"), [(1, 2, 3, 1), (7, 3, 4, 2), (64, 4, 3, 2), (150, 3, 5, 3), (5, 40, 2, 3)]
)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_values_and_gradients(T: int, E: int, M: int, C: int, kernels: str) -> None:
    inputs = draw(T, E, M, C)
    q, k, v, _, weights = inputs
    ours = chapter_attention(*inputs, scale=0.4, kernels=kernels)
    theirs = by_position(*inputs, 0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(ours)
    actual, expected = (torch.autograd.grad(y, (q, k, v, weights), upstream) for y in (ours, theirs))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    inputs = draw(40, 4, 5, 2)
    rounded = [x if x.dtype == torch.int64 else x.to(dtype) for x in inputs[:4]] + [inputs[4].float()]
    for kernels in ("auto", "reference"):
        y = chapter_attention(*rounded, scale=0.4, kernels=kernels)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), chapter_attention(*inputs, scale=0.4), rtol=tolerance, atol=tolerance)


def test_one_chapter_for_all_is_attention() -> None:
    q, k, v, _, _ = draw(9, 3, 4, 1)
    only = torch.ones(9, 1, dtype=torch.int64)
    y = chapter_attention(q, k, v, only, torch.ones(9, 1, dtype=torch.float64), scale=0.4)
    whole = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k[1], v[1])), scale=0.4).transpose(0, 1)
    torch.testing.assert_close(y, whole, rtol=1e-11, atol=1e-12)


@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(0, 8), min_size=1, max_size=300))
def test_blocks_hold_every_pair_once_beside_its_own_chapter(num_chapters: int, drawn: list[int]) -> None:
    chapters = torch.tensor(drawn) % num_chapters
    blocks = blocks_of(chapters, num_chapters)
    assert len(set(blocks.place_X.tolist())) == len(drawn)
    assert blocks.place_X.max() < len(blocks.chapter_J) * blocks.rows
    assert torch.equal(blocks.chapter_J[blocks.place_X // blocks.rows], chapters)


def test_blocks_waste_little_when_chapters_are_used_alike() -> None:
    pairs, num_chapters = 4096, 16
    blocks = blocks_of(torch.arange(pairs) % num_chapters, num_chapters)
    assert len(blocks.chapter_J) * blocks.rows <= pairs * (1 + 1 / BLOCKS_PER_CHAPTER)


def test_shapes_do_not_depend_on_the_choice() -> None:
    """What a compiled graph relies on."""
    alike, one = (blocks_of(c, 5) for c in (torch.arange(100) % 5, torch.full((100,), 3)))
    assert (alike.rows, alike.chapter_J.shape) == (one.rows, one.chapter_J.shape)
