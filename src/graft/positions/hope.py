"""Hyperbolic rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graft.errors import ConfigError
from graft.positions.base import AttentionPosition, Tables
from graft.positions.hope_config import HopeConfig
from graft.shapes import Float


class Hope(AttentionPosition):
    """HoPE (arXiv 2509.05218): Lorentz boosts of channel pairs in place of rotations, damped so that scores only fall.

    For channels (2i, 2i + 1) at distance r the score is ``e^(−θ'_i·r) · qᵀ B(θ_i·r) k`` with B(φ) = [[cosh φ, −sinh φ],
    [−sinh φ, cosh φ]] and θ'_i = θ_i + damping. B is diagonal in u = (x_2i + x_2i+1)/√2 and v = (x_2i − x_2i+1)/√2, so
    that the score is ``u_q·u_k·e^(−(θ'_i + θ_i)·r) + v_q·v_k·e^(−(θ'_i − θ_i)·r)``: `encode` changes to those channels,
    `rates` gives the two exponents, and nothing grows that would overflow. All v channels fall at the rate ``damping``.

    Deviations: r is |i − j| (the paper is causal), so that an encoder has the same score on both sides; ``layer_scale``
    is no part of the paper, and counts physical layers: a looped layer has the same rates in every loop.

    Args:
        config: theta, damping, layer_scale.
        num_heads: N; not used, every attention position is built with it.
        head_dim: H.

    Raises:
        ConfigError: H is odd.
    """

    def __init__(self, config: HopeConfig, num_heads: int, head_dim: int):
        super().__init__()
        self.config = config
        self.num_pairs, odd = divmod(head_dim, 2)
        if odd:
            raise ConfigError(
                f"head_dim {head_dim} is odd, and hope acts on pairs of channels",
                where="position",
                fix="make head_dim even",
            )

    def encode(self, x_BTNH: Float[Tensor, "B T N H"], tables: Tables) -> Float[Tensor, "B T N H"]:
        """The same vectors in the channels u_0 … u_P−1, v_0 … v_P−1."""
        wide = x_BTNH.to(torch.promote_types(x_BTNH.dtype, torch.float32))
        even, odd = wide[..., 0::2], wide[..., 1::2]
        return (torch.cat((even + odd, even - odd), dim=-1) / math.sqrt(2)).to(x_BTNH.dtype)

    def rates(self, layer_idx: int, device: torch.device) -> Tensor:
        """[H] fp32: 2·θ_i + damping of the u channels, damping of the v channels; scaled with the layer."""
        steps = torch.arange(self.num_pairs, dtype=torch.float32, device=device) / max(self.num_pairs - 1, 1)
        boosts = self.config.theta**-steps
        slow = torch.full_like(boosts, self.config.damping)
        return torch.cat((2 * boosts + slow, slow)) * (1 + self.config.layer_scale * layer_idx)
