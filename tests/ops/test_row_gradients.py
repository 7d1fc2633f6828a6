"""Gradients of some rows: sums by row, order, and what is known of their size before any number is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.ops.row_gradients import coalesce_rows, group_rows, rows_only, split_rows, summed_rows, sums_by_row

LISTS = ([3, 1, 3, 0, 3, 1], [0, 1, 2], [0, 1, 1], [1, 0], [4], [2, 2, 2], [])


def unsorted(rows: list[int]) -> torch.Tensor:
    indices = torch.tensor([rows], dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, torch.randn(len(rows), 3), (6, 3), check_invariants=True)


@pytest.mark.parametrize("rows", LISTS, ids=str)
def test_every_row_once_in_order(rows: list[int]) -> None:
    gradient = unsorted(rows)
    for found in (coalesce_rows(gradient), summed_rows(gradient)):
        assert found.is_coalesced()
        assert split_rows(found)[0].tolist() == sorted(set(rows))
        torch.testing.assert_close(found.to_dense(), gradient.to_dense())


def test_rows_in_order_are_not_copied() -> None:
    gradient = unsorted([0, 2, 5])
    assert coalesce_rows(gradient)._values().data_ptr() == gradient._values().data_ptr()
    once = coalesce_rows(gradient)
    assert coalesce_rows(once) is once


@pytest.mark.parametrize("rows", LISTS, ids=str)
def test_weighted_sums_by_row(rows: list[int]) -> None:
    sources, weights = torch.randn(4, 3, dtype=torch.float64), torch.randn(len(rows), dtype=torch.float64)
    source = torch.arange(len(rows)) % 4
    groups = group_rows(torch.tensor(rows, dtype=torch.int64), 6)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for row, s, w in zip(rows, source, weights, strict=True):
        expected[row] += w * sources[s]
    found = rows_only(groups.rows, sums_by_row(groups, sources, source, weights), 6)
    torch.testing.assert_close(found.to_dense(), expected)


def test_a_row_beyond_the_table_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        group_rows(torch.tensor([0, 6]), 6)


@pytest.mark.parametrize(("reads", "most"), [(4, 4), (9, 6)])
def test_without_numbers_every_read_may_be_another_row(reads: int, most: int) -> None:
    with FakeTensorMode():
        groups = group_rows(torch.zeros(reads, dtype=torch.int64), 6)
    assert [t.shape for t in groups] == [(reads,), (most,), (most,)]
