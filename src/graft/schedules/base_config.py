"""Warm-up and floor, shared by every schedule."""

from __future__ import annotations

from collections.abc import Iterator

from graft.config.base import Problem, knob
from graft.config.families import ScheduleConfig


class WarmupScheduleConfig(ScheduleConfig):
    """Linear warm-up, (step + 1) / warmup, then the variant's shape. At most one of the three warm-up fields."""

    warmup_steps: int | None = knob(None, "warm-up in optimizer updates", ge=0)
    warmup_fraction: float | None = knob(None, "warm-up as a share of all steps", ge=0.0, le=1.0)
    warmup_tokens: int | None = knob(None, "warm-up in training tokens, rounded to whole steps", ge=0)

    def num_warmup_steps(self, max_steps: int, tokens_per_step: int) -> int:
        """Warm-up in optimizer updates."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_fraction is not None:
            return round(self.warmup_fraction * max_steps)
        if self.warmup_tokens is not None:
            return round(self.warmup_tokens / tokens_per_step)
        return 0

    def problems(self) -> Iterator[Problem]:
        given = [n for n in ("warmup_steps", "warmup_fraction", "warmup_tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            yield Problem((given[1],), f"{' and '.join(given)} are given", "keep one")

    def problems_for(self, max_steps: int, tokens_per_step: int) -> Iterator[Problem]:
        """A warm-up longer than the run."""
        warmup = self.num_warmup_steps(max_steps, tokens_per_step)
        if warmup > max_steps:
            field = "warmup_steps" if self.warmup_steps is not None else "warmup_tokens"
            yield Problem((field,), f"warm-up of {warmup} steps exceeds max_steps {max_steps}", "shorten the warm-up")


class DecayingScheduleConfig(WarmupScheduleConfig):
    """A schedule that ends at a floor."""

    min_lr_ratio: float = knob(0.1, "learning rate at the end as a share of the peak, in [0, 1]", ge=0.0, le=1.0)
