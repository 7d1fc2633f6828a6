"""A memory whose weights learn while they read (Titans, arXiv 2501.00663), over a whole row.

What it computes is said in `graft.ops.neural_memory_chunk`, in plain form in `graft.ops.neural_memory_reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graft.ops.documents import Documents
from graft.ops.kernels import Kernels
from graft.ops.neural_memory_chunk import Bases, Columns, Memory, Weights, Writing, advance
from graft.ops.neural_memory_reference import reference_step

ProposeAt = Callable[[Bases, int, int], Writing]
"""What columns [start, end) write, given the weights with which each one's chunk began; asked in order of columns."""


def width_of(chunk_size: int, kernels: Kernels) -> int:
    """Columns that `scan` takes at a time.

    What is proposed should be taken apart at once with it (``split``): the gradient of a slice is a tensor over all
    columns, for each slice.
    """
    return 1 if kernels == "reference" else chunk_size


def scan(
    propose: ProposeAt,
    memory: Memory,
    start: Weights,
    documents: Documents | None,
    *,
    length: int,
    chunk_size: int,
    max_surprise: float | None = None,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Memory]:
    """Reads and writes ``length`` columns of a row.

    Args:
        propose: what columns write.
        memory: before the first column.
        start: the learned start, [1, N, in, out] per layer.
        documents: of all columns; None = one document without padding, which begins at the first column.
        length: columns.
        chunk_size: tokens of a document that share their gradients' weights.
        max_surprise: the greatest length of a token's gradient; longer ones are shortened to it. None = any.
        kernels: ``reference`` goes token by token.

    Returns:
        What the columns read, [B, N, T, H], and the memory after the last.
    """
    assert documents is not None or kernels == "auto", "the definition counts the tokens of documents"
    width = width_of(chunk_size, kernels)
    step = reference_step if kernels == "reference" else advance
    read: list[Tensor] = []
    for first in range(0, length, width):
        last = min(first + width, length)

        def propose_here(bases: Bases, first: int = first, last: int = last) -> Writing:
            return propose(bases, first, last)

        columns = None if documents is None else columns_of(documents, first, last, chunk_size)
        y, memory = step(propose_here, memory, start, columns, max_surprise)
        read.append(y)
    return torch.cat(read, dim=2), memory


def columns_of(documents: Documents, first: int, last: int, chunk_size: int) -> Columns:
    """What `advance` must know of columns [first, last)."""
    now = slice(first, last)
    run_BC = documents.run_BT[:, now]
    if first:
        run_BC = run_BC - documents.run_BT[:, first - 1 : first]
    real_BC, index_BC = documents.real_BT[:, now], documents.index_BT[:, now]
    return Columns(real_BC, run_BC, real_BC & (index_BC > 0) & (index_BC % chunk_size == 0))
