"""What a position may do. Three small interfaces; a variant implements the ones it needs.

`AttentionPosition` acts inside attention, in three places: `encode` changes queries and keys, each by its own position
(keys are encoded once, before they are cached), `rates` lets the channels of q·k fade with distance, and `slopes`
subtracts a multiple of the distance from the scores. Distances are counted in positions of one document.
A position whose score is made in another way adds a method of its own here.
`TablePosition` needs numbers that depend on the positions alone: the model computes them once per forward, for all
layers with an equal `table_key`. `EmbeddingPosition` is a vector per position, added to the embeddings.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Tables = tuple[Tensor, ...]
"""What `TablePosition.tables` returns: the variant's own affair."""


class AttentionPosition(nn.Module):
    """Base of positions inside attention; by itself it changes nothing."""

    def encode(self, x_BTNH: Tensor, tables: Tables) -> Tensor:
        """Queries or keys with their own position worked in: same shape and dtype.

        Args:
            x_BTNH: queries [B, T, N, H] or keys [B, T, K, H].
            tables: what `tables` returned for the same positions; empty for a position without tables.
        """
        return x_BTNH

    def slopes(self, device: torch.device) -> Tensor | None:
        """[N] fp32 constants: head n's score of positions i, j loses ``slopes[n]·|i - j|``; None = no such term."""
        return None

    def rates(self, layer_idx: int, device: torch.device) -> Tensor | None:
        """[H] fp32 constants ≥ 0: channel c of encoded q_i·k_j is multiplied by ``e^(−rates[c]·|i - j|)``; None = by 1.

        Args:
            layer_idx: physical layer of the attention, from 0.
            device: where the constants are wanted.
        """
        return None


class TablePosition(AttentionPosition):
    """A position with numbers that the layers of one forward share."""

    table_key: str
    """Equal for two modules exactly when `tables` gives both the same numbers."""

    @abstractmethod
    def tables(self, positions_BT: Tensor) -> Tables:
        """fp32 tables for int64 positions [B, T] (B may be 1 when all rows are alike), on the positions' device."""


class EmbeddingPosition(nn.Module):
    """Base of positions that are added to the embeddings."""

    @abstractmethod
    def forward(self, positions_BT: Tensor) -> Tensor:
        """int64 positions [B, T] to vectors [B, T, D]."""


def tables_for(position: AttentionPosition, shared: Mapping[str, Tables], positions_BT: Tensor) -> Tables:
    """The tables of ``position``: the ones computed for this forward, else computed now; empty when it has none."""
    if not isinstance(position, TablePosition):
        return ()
    found = shared.get(position.table_key)
    return position.tables(positions_BT) if found is None else found
