"""Everything periodic: what happens after a step besides the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from graft.config.advice import marked
from graft.training.evaluate import evaluate, evaluating
from graft.training.recorder import Recorder
from graft.training.run import Run
from graft.training.runtime import peak_memory_bytes
from graft.training.saving import Checkpoints
from graft.training.step import StepReport
from graft.training.throughput import Stopwatch
from graft.training.totals import Totals

Sampler = Callable[[Run], list[str]]
"""Makes a few texts with the model as it is."""


class Hook(Protocol):
    """Something that looks at a run after each step. Hooks run in a fixed order and leave the numbers alone."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Called when ``run.step`` updates are done."""
        ...


def due(run: Run, interval: int | None) -> bool:
    """Every ``interval`` steps (None = never) and after the last one."""
    return run.step == run.max_steps or (interval is not None and run.step % interval == 0)


class LogHook:
    """Writes a metric line every ``logging.interval`` steps: means over the steps since the line before.

    Args:
        recorder: where lines go.
        flops_per_token: of training, for the share of the peak.
        peak_flops: the device's matrix-product rate per second in the run's precision; None = unknown, no MFU.
    """

    def __init__(self, recorder: Recorder, *, flops_per_token: float, peak_flops: float | None):
        self._recorder = recorder
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._watch = Stopwatch()
        self._started = time.monotonic()

    def after_step(self, run: Run, report: StepReport) -> None:
        self._watch.add(report.seconds, sum(batch.num_positions for batch in report.microbatches))
        self._recorder.console.advance(run.step)
        if not due(run, run.experiment.logging.interval):
            return
        values = {
            **run.window.means(),
            "grad_norm": float(report.grad_norm) if report.grad_norm.isfinite() else None,
            "learning_rate": report.learning_rate,
            "tokens": run.tokens,
            "skipped_steps": run.guard.skipped_steps,
        }
        if run.precision.loss_scale is not None:
            values |= {"loss_scale": run.precision.loss_scale, "scaler_skips": run.guard.scaler_skips}
        line = self._recorder.line("train", run.step, values, self._time(run))
        self._recorder.console.show(run.step, run.max_steps, line, self._recorder.marks)
        run.window = Totals()

    def _time(self, run: Run) -> dict[str, float | None]:
        tokens_per_second, seconds_per_step = self._watch.read()
        rate = tokens_per_second * self._flops_per_token
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": rate / self._peak_flops if self._peak_flops else None,
            "memory_bytes": peak_memory_bytes(run.device),
            "seconds": time.monotonic() - self._started,
            "seconds_left": (run.max_steps - run.step) * seconds_per_step,
        }


class UsageHook:
    """Writes a line for everything the model chooses from every ``logging.usage_interval`` steps and at the end.

    The counts are those since the lines before; they are read from the device only then.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def after_step(self, run: Run, report: StepReport) -> None:
        settings = run.experiment.logging
        if not due(run, settings.usage_interval):
            return
        for name in run.usage.names():
            numbers = run.usage.summary(
                name, run.step, hot_threshold=settings.usage_hot_threshold, dead_after=settings.dead_after
            )
            self._recorder.line("usage", run.step, numbers, {}, of=name)
        run.usage.forget_counts()


class EvaluateHook:
    """Measures the held-out loss every ``evaluation.interval`` steps and at the end; remembers the best."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def after_step(self, run: Run, report: StepReport) -> None:
        if due(run, run.experiment.evaluation.interval):
            self.evaluate(run)

    def evaluate(self, run: Run) -> None:
        """Evaluates now, and remembers whether it was the best."""
        run.note_evaluation(self.measure(run))

    def measure(self, run: Run) -> dict[str, float | None]:
        """The numbers, written and told, without being remembered."""
        started = time.monotonic()
        numbers = evaluate(run)
        self._recorder.line("eval", run.step, numbers, {"seconds": time.monotonic() - started})
        loss, bpb = numbers["loss"], numbers["bpb"]
        text = "none" if loss is None else f"{loss:.4f}" + ("" if bpb is None else f"  bpb {bpb:.4f}")
        told = f"step {run.step}/{run.max_steps}  held-out loss {text}"
        self._recorder.console.say(marked(told, self._recorder.marks))
        return numbers


class CheckpointHook:
    """Saves every ``checkpoint.interval`` steps and after the last one.

    Not in the middle of a streak of non-finite steps: a checkpoint is what a rollback goes back to. The last step is
    saved in any case.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def after_step(self, run: Run, report: StepReport) -> None:
        finished = run.step == run.max_steps
        if finished or (due(run, run.experiment.checkpoint.interval) and not run.guard.streak):
            self._checkpoints.save(run, required=finished)


class SampleHook:
    """Shows a few texts every ``logging.samples_interval`` steps and at the end, and keeps them in ``events.jsonl``.

    Args:
        recorder: where texts go.
        sampler: makes them; draws from generators of its own.
    """

    def __init__(self, recorder: Recorder, sampler: Sampler):
        self._recorder = recorder
        self._sampler = sampler

    def after_step(self, run: Run, report: StepReport) -> None:
        if not due(run, run.experiment.logging.samples_interval):
            return
        with evaluating(run.model):
            texts = self._sampler(run)
        self._recorder.event("samples", run.step, {"texts": texts})
        for text in texts:
            self._recorder.console.say(f"--- sample at step {run.step} ---\n{text}")
