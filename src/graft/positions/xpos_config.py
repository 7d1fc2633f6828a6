"""Config of extrapolatable positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import PositionConfig


class XposConfig(PositionConfig):
    """xPos (2212.10554): rotary positions whose pairs fade with distance, those that turn fastest the most."""

    implementation = "graft.positions.xpos:Xpos"
    type: Literal["xpos"] = knob("xpos", "tag")
    theta: float = knob(10_000.0, "base of the wavelengths; larger = slower rotations", gt=0.0)
    scale_base: float = knob(512.0, "positions over which pair i falls by its factor ζ_i", gt=0.0)
    smoothing: float = knob(0.4, "γ in ζ_i = (2i/H + γ)/(1 + γ); larger = all pairs fade less", gt=0.0)

    def problems_with(self, head_dim: int) -> Iterator[Problem]:
        if head_dim % 2:
            yield Problem((), f"head_dim {head_dim} is odd, and channels act in pairs", "make head_dim even")
