"""What every packing is: rows of a token store as a pure function of (seed, epoch, index)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from graft.config.families import PackingConfig
from graft.data.store import TokenStore

IGNORED_TARGET = -100
"""A target that is not predicted (`graft.data.batch` says the same; this module does without torch)."""


class Rows(NamedTuple):
    """n rows of T tokens.

    Args:
        input_ids: [n, T] int64.
        targets: [n, T] int64, the id that follows each position in its document (or -100).
        segment_ids: [n, T] int64 document numbers within the row from 1, 0 = padding; None = one segment, no padding.
        positions: [n, T] int64 positions within the segment; None exactly when segment_ids is.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    segment_ids: NDArray[np.int64] | None
    positions: NDArray[np.int64] | None


class Packing(ABC):
    """Built by ``config.build(store, seq_len=, seed=)``. Whether rows have segment ids never changes in its life, so
    the shapes of batches do not either."""

    config: PackingConfig
    num_rows: int
    """Rows of an epoch, the same in every epoch."""

    def __init__(self, store: TokenStore, *, seq_len: int, seed: int):
        assert store.num_tokens > seq_len, "checked when the data is prepared"
        self.store = store
        self.seq_len = seq_len
        self.seed = seed

    @abstractmethod
    def rows(self, epoch: int, indices: NDArray[np.int64]) -> Rows:
        """The rows at ``indices`` (each below `num_rows`) of an epoch's order."""

    @property
    @abstractmethod
    def efficiency(self) -> float:
        """Share of an epoch's positions whose target is predicted."""
