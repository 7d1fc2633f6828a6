"""The constant schedule."""

from __future__ import annotations

from graft.schedules.base import Schedule


class ConstantSchedule(Schedule):
    """Warm-up, then the peak: ``factor = min(1, (step + 1) / warmup)``."""

    def after_warmup(self, time: int) -> float:
        return 1.0
