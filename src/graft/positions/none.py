"""No position information."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.positions.base import AttentionPosition, EmbeddingPosition
from graft.positions.none_config import NoPositionConfig


class NoPosition(AttentionPosition, EmbeddingPosition):
    """No positions (NoPE, arXiv 2305.19466): q and k stay as they are, nothing is added to embeddings.

    Args:
        config: has no fields.
        sizes: ``num_heads, head_dim`` in attention, ``hidden_size`` in the embedding.
    """

    def __init__(self, config: NoPositionConfig, *sizes: int):
        super().__init__()
        self.config = config
        self.size = sizes[-1]

    def forward(self, positions_BT: Tensor) -> Tensor:
        """[B, T, D] integer zeros: added to vectors of any dtype they change neither value nor dtype."""
        return torch.zeros_like(positions_BT).unsqueeze(-1).expand(*positions_BT.shape, self.size)
