"""Config of hyperbolic rotary positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import PositionConfig


class HopeConfig(PositionConfig):
    """Hyperbolic rotary positions (HoPE, 2509.05218): channel pairs of q·k fade with distance, each at two rates."""

    implementation = "graft.positions.hope:Hope"
    type: Literal["hope"] = knob("hope", "tag")
    theta: float = knob(
        10_000.0, "base of the boosts: pair i has θ_i = theta^(−i/(H/2 − 1)), from 1 down to 1/theta", ge=1.0
    )
    damping: float = knob(
        0.01, "c in θ'_i = θ_i + c, per position: the slow half of the channels falls by e^(−c) per step", gt=0.0
    )
    layer_scale: float = knob(0.0, "all rates are multiplied by 1 + this · layer index (from 0)", ge=0.0)

    def problems_with(self, head_dim: int) -> Iterator[Problem]:
        if head_dim % 2:
            yield Problem((), f"head_dim {head_dim} is odd, and channels act in pairs", "make head_dim even")
