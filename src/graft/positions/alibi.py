"""Attention with linear biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graft.positions.alibi_config import AlibiConfig
from graft.positions.base import AttentionPosition


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head: 2^(−8·i/N) for i = 1…N when N is a power of two.

    Otherwise those of the power of two M below N, then every other one of 2M's, as the authors' own code does.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    between = [2.0 ** (-8.0 * i / (2 * below)) for i in range(1, 2 * below + 1, 2)]
    return slopes + between[: num_heads - below]


class Alibi(AttentionPosition):
    """ALiBi (arXiv 2108.12409, section 3): score(i, j) = scale·q_i·k_j − slope_n·(i − j); q and k are not changed.

    Deviations: an encoder uses the distance |i − j| (the paper is causal only); with a soft-cap the bias is added
    after it, so that far positions keep losing; the bias is not multiplied by the score's scale (as the authors' code).

    Args:
        config: has no fields.
        num_heads: N.
        head_dim: H; not used, every attention position is built with it.
    """

    def __init__(self, config: AlibiConfig, num_heads: int, head_dim: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads

    def slopes(self, device: torch.device) -> Tensor:
        """[N] fp32, steepest head first within each series."""
        return torch.tensor(alibi_slopes(self.num_heads), dtype=torch.float32, device=device)
