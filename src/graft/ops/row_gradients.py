"""Gradients of tables of which a step reads only some rows: sums by row, and tensors that hold just those rows.

A module names its tables that can have such gradients in ``row_tables``. The optimizer's builder marks a parameter
whose update is row-wise (`mark_rows`); the operation that reads the table asks (`wants_rows`) and then yields a sparse
COO gradient: sorted rows, each once, and their values. Sums of several (micro-batches, loops) come out of autograd
unsorted; `coalesce_rows` puts them in order again.

An embedding table that is the head's matrix too has a dense gradient, to which its look-ups add a few rows:
`LookUpsApart`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RowGroups(NamedTuple):
    """Equal numbers of a list brought together.

    Args:
        order: [n], positions in the list, sorted by number; equal numbers keep their order.
        rows: [U], the numbers that occur, rising.
        starts: [U], where each one's positions begin in ``order``.
    """

    order: Tensor
    rows: Tensor
    starts: Tensor


def mark_rows(table: Tensor, wanted: bool) -> None:
    """Says whether the table's gradient shall hold only the rows that were read."""
    table.row_gradients = wanted  # pyright: ignore[reportAttributeAccessIssue]


def wants_rows(table: Tensor) -> bool:
    """What `mark_rows` said last; False before."""
    return getattr(table, "row_gradients", False)


def group_rows(numbers_n: Tensor, num_rows: int) -> RowGroups:
    """Sorts positions by the row they belong to.

    Args:
        numbers_n: int64 row numbers, in any order.
        num_rows: rows there are.
    """
    return RowGroups(*_group_rows(numbers_n, num_rows))


@torch.library.custom_op("graft::group_rows", mutates_args=())
def _group_rows(numbers_n: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    assert numbers_n.numel() == 0 or int(numbers_n.max()) < num_rows
    ordered, order = torch.sort(numbers_n, stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    return order, rows, counts.cumsum(0) - counts


@_group_rows.register_fake
def _(numbers_n: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    most = min(num_rows, numbers_n.numel())  # how many occur depends on the numbers: all that can
    return torch.empty_like(numbers_n), numbers_n.new_empty(most), numbers_n.new_empty(most)


def sums_by_row(groups: RowGroups, sources_SW: Tensor, source_n: Tensor, weights_n: Tensor | None = None) -> Tensor:
    """[U, W]: for each row that occurs, ``Σ weights[p] · sources[source[p]]`` over its positions p, in order.

    Args:
        groups: of the n positions, by row.
        sources_SW: what is summed.
        source_n: which of the sources each position adds.
        weights_n: factor of each position; None = 1.
    """
    weights = None if weights_n is None else weights_n[groups.order]
    return F.embedding_bag(source_n[groups.order], sources_SW, groups.starts, mode="sum", per_sample_weights=weights)


def rows_only(rows_U: Tensor, values_UW: Tensor, num_rows: int) -> Tensor:
    """The [num_rows, W] gradient that is zero outside ``rows_U`` (rising, each once), as a sparse COO tensor."""
    size = (num_rows, values_UW.shape[1])
    return torch.sparse_coo_tensor(rows_U[None], values_UW, size, is_coalesced=True, check_invariants=False)


def split_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n] and values [n, W] of a row gradient: the tensors themselves, to be read or changed in place."""
    return gradient._indices()[0], gradient._values()


def summed_rows(gradient: Tensor) -> Tensor:
    """A row gradient with every row once, rising; equal rows are added."""
    rows, values = split_rows(gradient)
    groups = group_rows(rows, gradient.shape[0])
    sums = sums_by_row(groups, values, torch.arange(len(rows), device=rows.device))
    return rows_only(groups.rows, sums, gradient.shape[0])


def coalesce_rows(gradient: Tensor) -> Tensor:
    """`summed_rows`, without work when the rows are in order already."""
    if gradient.is_coalesced():
        return gradient
    rows, values = split_rows(gradient)
    if bool((rows[1:] > rows[:-1]).all()):  # autograd forgets that it was told so
        return rows_only(rows, values, gradient.shape[0])
    return summed_rows(gradient)


class LookUpsApart:
    """The rows that look-ups add to a table's gradient, kept apart from the rest of it until `add_up`.

    Autograd would add them, as rows or as a dense tensor, by making a third tensor as large as the table. For one
    process: whatever reduces gradients among several inside the backward pass does not see these rows.

    Args:
        table: read by `look_up` and by other operations.
    """

    def __init__(self, table: Tensor):
        self._table = table
        self._read: list[Tensor] = []

    @contextmanager
    def during(self) -> Iterator[None]:
        """What is looked up inside has its gradient kept apart, whenever backward runs."""
        read = self._table.detach().requires_grad_()  # the same memory
        self._read.append(read)
        self._table.apart = read  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            del self._table.apart  # pyright: ignore[reportAttributeAccessIssue]

    def add_up(self) -> None:
        """Adds what was kept to the table's gradient, and forgets it."""
        for rows in (read.grad for read in self._read if read.grad is not None):
            if self._table.grad is None:
                self._table.grad = rows.to_dense()
            else:
                self._table.grad += rows
        self._read.clear()


def look_up(ids: Tensor, table: Tensor) -> Tensor:
    """``table[ids]``, [*ids, W]; its gradient is the table's own, or kept apart (`LookUpsApart`)."""
    apart: Tensor | None = getattr(table, "apart", None)
    return F.embedding(ids, table) if apart is None else F.embedding(ids, apart, sparse=True)
