"""The cosine schedule."""

from __future__ import annotations

from graft.schedules.base import DecayingSchedule, cosine_height


class CosineSchedule(DecayingSchedule):
    """Warm-up, then half a cosine to the floor: ``floor + (1 - floor) · ½(1 + cos πp)``.

    Source: SGDR (1608.03983), equation 5, for one cycle.
    Deviations: no restarts; a linear warm-up comes first; ``p = (step + 1 - warmup) / (max_steps - warmup)`` is 1 at
    the last update. The curve is rescaled to end at the floor, not clipped there.
    """

    def height(self, progress: float) -> float:
        return cosine_height(progress)
