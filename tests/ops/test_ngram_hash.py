"""Hashed n-grams: what they look back at, their arithmetic, and how they spread."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.ops.ngram_hash import LARGEST, hashed_rows, primes_from, suffixes

documents = st.lists(st.sampled_from([0, 3, 3, 5, 5, 7]), min_size=9, max_size=9)


def test_suffixes_by_hand() -> None:
    ids, segments = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[4, 4, 9, 9, 0]])
    assert suffixes(ids, None, 3)[0].tolist() == [[11, 0, 0], [12, 11, 0], [13, 12, 11], [14, 13, 12], [15, 14, 13]]
    assert suffixes(ids, segments, 3)[0].tolist() == [[11, 0, 0], [12, 11, 0], [13, 0, 0], [14, 13, 0], [0, 0, 0]]


@settings(max_examples=40)
@given(segments=st.none() | st.tuples(documents, documents), length=st.integers(1, 5))
def test_both_forms_agree(segments: tuple[list[int], ...] | None, length: int) -> None:
    ids = torch.randint(50, (2, 9))
    numbers = None if segments is None else torch.tensor(segments)
    fast = suffixes(ids, numbers, length)
    assert torch.equal(fast, suffixes(ids, numbers, length, kernels="reference"))


@given(st.integers(0, 10_000))
def test_hashes_by_hand(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1001, (2, 3, 4), generator=generator)
    multipliers = torch.randint(LARGEST // 1000, (5, 4), generator=generator)
    multipliers[:2, 2:] = 0
    sizes = torch.tensor([7, 11, 101, 503, 1009])
    rows = hashed_rows(numbers, multipliers, sizes)
    for b, t, r in itertools.product(range(2), range(3), range(5)):
        mixed = 0
        for number, factor in zip(numbers[b, t].tolist(), multipliers[r].tolist(), strict=True):
            mixed ^= number * factor  # Python's integers know no overflow
        assert rows[b, t, r].item() == mixed % int(sizes[r])


def test_pairs_spread_over_a_table() -> None:
    pairs = torch.tensor(list(itertools.product(range(1, 61), repeat=2)))[None]
    multipliers = torch.randint(LARGEST // 256, (2, 2), generator=torch.Generator().manual_seed(0)) * 2 + 1
    rows = hashed_rows(pairs, multipliers, torch.tensor([503, 509]))[0]
    for column, size in zip(rows.T, (503, 509), strict=True):
        load = torch.bincount(column, minlength=size)
        assert (load > 0).float().mean() > 0.98
        assert load.max() < 6 * len(column) / size
    together = rows[:, 0] * 509 + rows[:, 1]
    assert together.unique().numel() > 0.97 * len(together)  # what collides in one rarely collides in the other


@pytest.mark.parametrize(("start", "expected"), [(0, [2, 3, 5, 7]), (7, [7, 11, 13, 17]), (500, [503, 509, 521, 523])])
def test_primes(start: int, expected: list[int]) -> None:
    assert primes_from(start, 4) == expected
