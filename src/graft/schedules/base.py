"""Learning rate as a share of the peak, over the updates of a run.

Time runs on the interval [0, max_steps] and update ``step`` (from 0) occupies [step, step + 1]; its factor is the
curve's value at the *end* of that interval. So the first of W warm-up updates uses 1/W and not 0, the W-th uses the
peak, and the last update of the run uses the floor exactly (not the one after it, which never happens).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from graft.schedules.base_config import DecayingScheduleConfig, WarmupScheduleConfig


class Schedule(ABC):
    """Linear warm-up, then the variant's curve.

    Args:
        config: warm-up settings.
        max_steps: optimizer updates in the run.
        tokens_per_step: training positions per update (turns warm-up tokens into updates).
    """

    def __init__(self, config: WarmupScheduleConfig, *, max_steps: int, tokens_per_step: int):
        self.max_steps = max_steps
        self.warmup_steps = config.num_warmup_steps(max_steps, tokens_per_step)
        assert 0 <= self.warmup_steps <= max_steps, f"warm-up of {self.warmup_steps} in {max_steps} steps"

    def factor(self, step: int) -> float:
        """The share of the peak learning rate that update ``step`` (from 0) uses, in [0, 1]. A pure function.

        After the last update of the run the factor stays what it was there.
        """
        assert step >= 0, step
        time = min(step + 1, self.max_steps)
        if time < self.warmup_steps:
            return time / self.warmup_steps
        return self.after_warmup(time)

    @abstractmethod
    def after_warmup(self, time: int) -> float:
        """The curve at ``time`` in [warmup_steps, max_steps], in updates."""


class DecayingSchedule(Schedule):
    """A schedule whose last ``decay_steps`` (a real number) go from the peak to ``min_lr_ratio``.

    Args:
        config: warm-up settings and the floor.
        max_steps: optimizer updates in the run.
        tokens_per_step: training positions per update.
        decay_frac: share of the steps after warm-up spent decaying.
    """

    def __init__(
        self, config: DecayingScheduleConfig, *, max_steps: int, tokens_per_step: int, decay_frac: float = 1.0
    ):
        super().__init__(config, max_steps=max_steps, tokens_per_step=tokens_per_step)
        self.min_lr_ratio = config.min_lr_ratio
        self.decay_steps = decay_frac * (max_steps - self.warmup_steps)

    def after_warmup(self, time: int) -> float:
        left = self.max_steps - time
        if left >= self.decay_steps:
            return 1.0
        height = self.height(1.0 - left / self.decay_steps)
        return height + self.min_lr_ratio * (1.0 - height)  # rescaled: the floor is an end point, not a clip

    @abstractmethod
    def height(self, progress: float) -> float:
        """The curve's shape without floor: 1 at progress 0, 0 at progress 1, falling between."""


def linear_height(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - progress


def cosine_height(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def one_minus_sqrt_height(progress: float) -> float:
    """1 - √progress: falls fast at first, from 1 to 0."""
    return 1.0 - math.sqrt(progress)
