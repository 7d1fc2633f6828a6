"""Learned absolute positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.initialization import Rng, normal_
from graft.positions.base import EmbeddingPosition
from graft.positions.learned_config import LearnedPositionConfig
from graft.shapes import Float, Int


class LearnedPosition(EmbeddingPosition):
    """A learned vector per position, added to the embedding (arXiv 1706.03762, section 3.5; GPT-2).

    Rows start from N(0, init_std²). Deviation: GPT-2 starts positions at half the spread of its tokens; here both
    start alike unless the caller gives another ``init_std``.

    Args:
        config: gives the number of rows.
        hidden_size: D.
        init_std: standard deviation of the rows at the start.
    """

    role = "embedding"

    def __init__(self, config: LearnedPositionConfig, hidden_size: int, *, init_std: float = 0.02):
        super().__init__()
        self.config = config
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(config.max_seq_len, hidden_size))

    def init_parameters(self, rng: Rng) -> None:
        """Fills the table."""
        normal_(self.weight, self.init_std, rng("weight"))

    def forward(self, positions_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """int64 positions [B, T] to vectors [B, T, D].

        Raises:
            ConfigError: T is more than the table's rows. (A single position past the end is an IndexError of the
                look-up: finding it here would wait for the device at every step.)
        """
        limit = self.config.max_seq_len
        if positions_BT.shape[-1] > limit:
            raise ConfigError(
                f"a sequence of {positions_BT.shape[-1]} tokens has no position past {limit}",
                where="model.embedding.position.max_seq_len",
                fix="use shorter sequences, or train with more positions",
            )
        return F.embedding(positions_BT, self.weight)
