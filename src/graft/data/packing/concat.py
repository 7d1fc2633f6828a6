"""Documents end to end, cut into rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from graft.data.order import number_of, permutation
from graft.data.packing.base import IGNORED_TARGET, Packing, Rows
from graft.data.packing.concat_config import ConcatPackingConfig
from graft.data.store import TokenStore


class _Epoch(NamedTuple):
    number: int
    ends: NDArray[np.int64]  # where each document of the shuffled stream ends
    shift: NDArray[np.int64]  # position in the store minus position in the stream, for each document
    rows: NDArray[np.int64]  # shuffled row numbers
    phase: int


class ConcatPacking(Packing):
    """Every epoch shuffles the documents into one circular stream of L tokens, begins at a random phase in [0, T), and
    cuts ceil(L / T) rows of T inputs and T targets (the inputs shifted by one), whose order is shuffled too.

    Every token and every document end is a target exactly once per epoch: if T does not divide L, the surplus targets
    of the row that closes the circle are ignored (its inputs are real text). One document only: rows are crops of it
    at a new phase each epoch, close to nanoGPT's random crops but without repetition, and there are no segments.

    With ``document_mask`` the segments of a row are its documents; a document that began in an earlier row counts its
    positions from the row's start.

    Memory: O(documents + L / T) per epoch, for the two newest epochs.
    """

    def __init__(self, config: ConcatPackingConfig, store: TokenStore, *, seq_len: int, seed: int):
        super().__init__(store, seq_len=seq_len, seed=seed)
        self.config = config
        self.num_rows = -(-store.num_tokens // seq_len)
        self.has_segments = config.document_mask and store.num_documents > 1
        self._epochs: dict[int, _Epoch] = {}

    @property
    def efficiency(self) -> float:
        return self.store.num_tokens / (self.num_rows * self.seq_len)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            key = (self.seed, number)
            order = permutation(self.store.num_documents, *key, "documents")
            lengths = self.store.lengths[order]
            ends = np.cumsum(lengths)
            shift = self.store.starts[order] - (ends - lengths)
            rows = permutation(self.num_rows, *key, "rows")
            phase = number_of(*key, "phase") % self.seq_len
            self._epochs[number] = _Epoch(number, ends, shift, rows, phase)
        return self._epochs[number]

    def rows(self, epoch: int, indices: NDArray[np.int64]) -> Rows:
        layout, length, total = self._epoch(epoch), self.seq_len, self.store.num_tokens
        offsets = layout.rows[indices][:, None] * length
        stream = (layout.phase + offsets + np.arange(length + 1)) % total
        document = np.searchsorted(layout.ends, stream, side="right")
        ids = self.store.gather(stream + layout.shift[document])
        inputs, targets = ids[:, :-1], ids[:, 1:].copy()
        targets[offsets + np.arange(length) >= total] = IGNORED_TARGET
        if not self.has_segments:
            return Rows(inputs, targets, None, None)
        return Rows(inputs, targets, *_segments(inputs == self.store.end_of_document))


def _segments(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Segment ids and positions of rows in which documents begin where ``starts`` [n, T] is True."""
    segments = np.cumsum(starts, axis=1, dtype=np.int64) + (~starts[:, :1]).astype(np.int64)
    column = np.arange(starts.shape[1])
    begins = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return segments, column - begins
