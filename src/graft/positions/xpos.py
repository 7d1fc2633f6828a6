"""Extrapolatable positions: rotations that fade with distance."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.errors import ConfigError
from graft.positions.base import TablePosition, Tables
from graft.positions.rope import Rope
from graft.positions.rope_config import RopeConfig
from graft.positions.xpos_config import XposConfig
from graft.shapes import Float, Int


class Xpos(TablePosition):
    """xPos (arXiv 2212.10554, section 3.2): rotary positions, pair i of q_m·k_n times ``ζ_i^((m − n) / scale_base)``.

    With ``ζ_i = (2i/H + smoothing)/(1 + smoothing)`` the pairs that turn fastest fade most. The paper multiplies q_m by
    ζ^(m/scale_base) and k_n by ζ^(−n/scale_base), which leaves the range of fp32 after some ten thousand positions, or
    shifts both by the middle of the sequence, which puts that off by a factor of two and cannot be done to keys that
    are cached already. Here each pair's factor is a rate of fading with the distance (`rates`), so that no factor above
    1 is ever formed, at any position.

    Deviations: pairs are (i, i + H/2), as in `graft.positions.rope`; the exponent is |m − n|, the same for the paper's
    decoder, where an encoder would otherwise see later positions grow. The paper's blockwise causal attention is no
    part of this.

    Args:
        config: theta, scale_base, smoothing.
        num_heads: N.
        head_dim: H.

    Raises:
        ConfigError: H is odd.
    """

    def __init__(self, config: XposConfig, num_heads: int, head_dim: int):
        super().__init__()
        if head_dim % 2:
            raise ConfigError(
                f"head_dim {head_dim} is odd, and xpos acts on pairs of channels",
                where="position",
                fix="make head_dim even",
            )
        self.config = config
        self.num_pairs = head_dim // 2
        self.scale_base, self.smoothing = config.scale_base, config.smoothing
        self.rotation = Rope(RopeConfig(theta=config.theta), num_heads, head_dim)
        self.table_key = self.rotation.table_key  # one table for both kinds of layers

    def tables(self, positions_BT: Int[Tensor, "B T"]) -> Tables:
        """cos and sin, as `Rope.tables`."""
        return self.rotation.tables(positions_BT)

    def encode(self, x_BTNH: Float[Tensor, "B T N H"], tables: Tables) -> Float[Tensor, "B T N H"]:
        """[B, T, N, H], each head rotated."""
        return self.rotation.encode(x_BTNH, tables)

    def rates(self, layer_idx: int, device: torch.device) -> Tensor:
        """[H] fp32: ``−ln ζ_i / scale_base`` for both channels of pair i; alike in all layers."""
        share = torch.arange(self.num_pairs, dtype=torch.float32, device=device) / self.num_pairs
        zeta = (share + self.smoothing) / (1 + self.smoothing)
        return (-zeta.log() / self.scale_base).repeat(2)
