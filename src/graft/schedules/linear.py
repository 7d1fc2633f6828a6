"""The linear schedule."""

from __future__ import annotations

from graft.schedules.base import DecayingSchedule, linear_height


class LinearSchedule(DecayingSchedule):
    """Warm-up, then a straight line to the floor: ``floor + (1 - floor) · (1 - p)``.

    ``p = (step + 1 - warmup) / (max_steps - warmup)`` is 1 at the last update.
    """

    def height(self, progress: float) -> float:
        return linear_height(progress)
