"""Whole documents in rows, padded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graft.data.order import permutation
from graft.data.packing.base import IGNORED_TARGET, Packing, Rows
from graft.data.packing.best_fit_config import BestFitPackingConfig
from graft.data.store import TokenStore


class BestFitPacking(Packing):
    """Best-fit decreasing (Fewer Truncations Improve Language Modeling, 2404.10830).

    A document of n tokens (its end-of-document id first) takes n positions: its last target is the end-of-document id
    again. Documents longer than T are cut into pieces of T and a rest; pieces, longest first, go into the row that
    they fill best. The rest of a row is padding: segment 0, target -100. Positions count from a piece's start.

    Which pieces share a row is fixed (they do not see each other); the order of rows is shuffled every epoch. Rows
    always have segment ids.

    Memory: O(pieces) plus O(rows) per epoch, for the two newest epochs.
    """

    def __init__(self, config: BestFitPackingConfig, store: TokenStore, *, seq_len: int, seed: int):
        super().__init__(store, seq_len=seq_len, seed=seed)
        self.config = config
        starts, lengths = _pieces(store.starts, seq_len)
        bins, self.num_rows = best_fit(lengths, seq_len)
        by_row = np.argsort(bins, kind="stable")
        self._starts, self._lengths = starts[by_row], lengths[by_row]
        self._first = np.searchsorted(bins[by_row], np.arange(self.num_rows + 1))  # each row's first piece
        filled = np.cumsum(self._lengths) - self._lengths
        self._columns = filled - np.repeat(filled[self._first[:-1]], np.diff(self._first))
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def efficiency(self) -> float:
        return self.store.num_tokens / (self.num_rows * self.seq_len)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(self.num_rows, self.seed, epoch, "rows")
        return self._orders[epoch]

    def rows(self, epoch: int, indices: NDArray[np.int64]) -> Rows:
        picked = self._order(epoch)[indices]
        counts = self._first[picked + 1] - self._first[picked]
        pieces = _ranges(self._first[picked], counts)
        lengths = self._lengths[pieces]
        row = np.repeat(np.repeat(np.arange(len(picked)), counts), lengths)
        column = _ranges(self._columns[pieces], lengths)
        stream = _ranges(self._starts[pieces], lengths)
        shape = (len(picked), self.seq_len)
        inputs = np.full(shape, self.store.end_of_document, dtype=np.int64)
        targets = np.full(shape, IGNORED_TARGET, dtype=np.int64)
        segments, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        inputs[row, column] = self.store.gather(stream)
        targets[row, column] = self.store.gather((stream + 1) % self.store.num_tokens)  # the next one begins with eod
        number = _ranges(np.ones(len(picked), dtype=np.int64), counts)
        segments[row, column] = np.repeat(number, lengths)
        positions[row, column] = _ranges(np.zeros(len(pieces), dtype=np.int64), lengths)
        return Rows(inputs, targets, segments, positions)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … of each (start, length), one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _pieces(document_starts: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and length of every piece: documents, those longer than ``seq_len`` cut into pieces of it and a rest."""
    lengths = np.diff(document_starts)
    counts = -(-lengths // seq_len)
    index = _ranges(np.zeros(len(counts), dtype=np.int64), counts)
    starts = np.repeat(document_starts[:-1], counts) + index * seq_len
    return starts, np.minimum(np.repeat(document_starts[1:], counts) - starts, seq_len)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Best-fit decreasing bin packing.

    Args:
        lengths: size of each piece, from 1 to ``capacity``; equal sizes keep their order.
        capacity: size of a bin.

    Returns:
        The bin of each piece, and the number of bins.

    The rooms left are a set of bits, so the tightest room is found in O(capacity / 64).
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms = 0  # bit r is set when a bin with room r is open
    used = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen, used = capacity, used, used + 1
        bins[piece] = chosen
        if room > size:
            open_bins.setdefault(room - size, []).append(chosen)
            rooms |= 1 << (room - size)
    return bins, used
