"""From step to step, until the end or until asked to stop."""

from __future__ import annotations

from collections.abc import Sequence

from graft.training.hooks import Hook
from graft.training.recovery import Recovery
from graft.training.run import Run
from graft.training.signals import StopRequest
from graft.training.step import train_step


def fit(run: Run, hooks: Sequence[Hook], recovery: Recovery, stop: StopRequest) -> None:
    """Trains until ``run.max_steps``, or until the step in which ``stop`` was requested is done and looked at.

    Raises what a hook or the recovery raises (`DivergedError`, `ResourceError`, …).
    """
    run.model.train()
    while run.step < run.max_steps and stop.reason is None:
        report = train_step(run)
        if recovery.after_step(run, report):
            continue
        for hook in hooks:
            hook.after_step(run, report)
