"""Where everything a run says about itself goes: metric lines, events, trackers, and the person who watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.training.console import Console
from graft.training.metrics import EventsLog, MetricsLog
from graft.training.trackers import Trackers


@dataclass(frozen=True)
class Notices:
    """What happens beside the numbers.

    Args:
        events: ``events.jsonl``: saves, skipped steps, rollbacks, warnings.
        console: the person who watches, and ``train.log``.
    """

    events: EventsLog
    console: Console

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        """Writes an event."""
        self.events.write(kind, details, step=step)

    def warn(self, step: int, text: str) -> None:
        """Tells the person and writes an event."""
        self.console.warn(text)
        self.event("warning", step, {"text": text})


@dataclass(frozen=True)
class Recorder(Notices):
    """All outlets of a run in training.

    Args:
        metrics: ``metrics.jsonl``: what two equal runs have in common (and under ``time`` what they have not).
        trackers: TensorBoard and the like.
        marks: what is true of every number of the run (`graft.config.advice.marks`): said wherever one goes.
    """

    metrics: MetricsLog
    trackers: Trackers
    marks: Mapping[str, bool]

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        super().event(kind, step, {**details, **self.marks})

    def line(
        self, kind: str, step: int, values: Mapping[str, Any], time: Mapping[str, Any], *, of: str | None = None
    ) -> dict[str, Any]:
        """Writes a metric line and returns its numbers. Trackers get numbers under marked names.

        Args:
            kind: ``train``, ``eval`` or ``usage``.
            step: the step it describes.
            values: what an equal run would have written too.
            time: what depends on the clock and the machine.
            of: what it describes, where there are several lines of a kind for one step.
        """
        named = {"kind": kind} if of is None else {"kind": kind, "of": of}
        self.metrics.write(step, {**named, **values, **self.marks}, time=time)
        numbers = {**values, **{f"time/{name}": value for name, value in time.items()}}
        prefix = "/".join((*self.marks, *named.values()))
        self.trackers.log(step, {f"{prefix}/{k}": float(v) for k, v in numbers.items() if isinstance(v, int | float)})
        return {**values, "time": time}
