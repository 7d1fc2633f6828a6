"""The warm-up, stable, decay schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from graft.schedules.base import DecayingSchedule, cosine_height, linear_height, one_minus_sqrt_height
from graft.schedules.wsd_config import WsdScheduleConfig

SHAPES: dict[Literal["linear", "cosine", "one_minus_sqrt"], Callable[[float], float]] = {
    "linear": linear_height,
    "cosine": cosine_height,
    "one_minus_sqrt": one_minus_sqrt_height,
}
"""Decay shape -> height over progress, from 1 to 0."""


class WsdSchedule(DecayingSchedule):
    """Warm-up, the peak, then a decay to the floor over the last ``decay_frac`` of the steps after warm-up.

    Source: MiniCPM (2404.06395); the 1 - sqrt shape is from 2405.18392.
    With ``decay_start = warmup + (1 - decay_frac) · (max_steps - warmup)`` (a real number, not rounded) and
    ``p = (step + 1 - decay_start) / (max_steps - decay_start)``, the factor is 1 while p ≤ 0, then
    ``floor + (1 - floor) · h(p)`` with h(p) = 1 - p, ½(1 + cos πp) or 1 - √p. The last update uses the floor.
    ``decay_frac`` 0 is constant, 1 decays right after warm-up.
    Deviation: MiniCPM's own decay is exponential; its later users' three shapes are offered instead.
    """

    def __init__(self, config: WsdScheduleConfig, *, max_steps: int, tokens_per_step: int):
        super().__init__(config, max_steps=max_steps, tokens_per_step=tokens_per_step, decay_frac=config.decay_frac)
        self.height_of = SHAPES[config.decay_shape]

    def height(self, progress: float) -> float:
        return self.height_of(progress)
