"""Getting out of a streak of non-finite steps: back to the last good checkpoint, past the data that led there."""

from __future__ import annotations

from graft.errors import DivergedError
from graft.training.guard import Verdict, first_non_finite
from graft.training.recorder import Recorder
from graft.training.run import Run
from graft.training.saving import Checkpoints
from graft.training.step import StepReport


class Recovery:
    """Looks at every step's verdict before any hook does.

    Args:
        checkpoints: where a good state may be.
        recorder: events of skipped steps and rollbacks; metric lines after the state gone back to are set aside.
    """

    def __init__(self, checkpoints: Checkpoints, recorder: Recorder):
        self._checkpoints = checkpoints
        self._recorder = recorder

    def after_step(self, run: Run, report: StepReport) -> bool:
        """Notes a skipped step; goes back when the streak is too long.

        After a rollback the run has the step, weights, optimizer and generators of the checkpoint, and the data
        position and counters it had just now: the data between is not read again.

        Returns:
            True when the run went back, so that ``report`` no longer belongs to it.

        Raises:
            DivergedError: no rollback is left, or there is no checkpoint to go back to.
        """
        if report.verdict is Verdict.GOOD:
            return False
        details = {
            "verdict": report.verdict.value,
            "loss": report.loss.item(),
            "grad_norm": report.grad_norm.item(),
            "sample_ids": sample_ids(report),
        }
        self._recorder.event("skipped_step", report.step, details)
        if not run.guard.must_roll_back:
            return False
        if not run.guard.may_roll_back or not self._checkpoints.any_valid():
            raise self._diverged(run, report)
        self._roll_back(run, report)
        return True

    def _roll_back(self, run: Run, report: StepReport) -> None:
        cursor, guard = run.loader.state_dict(), run.guard.state_dict()
        self._checkpoints.restore(run)
        run.loader.load_state_dict(cursor)
        run.guard.load_state_dict({**guard, "streak": 0, "rollbacks": guard["rollbacks"] + 1})
        self._recorder.metrics.rewind(run.step)
        self._recorder.event("rollback", report.step, {"to_step": run.step, "sample_ids": sample_ids(report)})
        self._recorder.console.warn(
            f"{guard['streak']} steps in a row up to step {report.step} were not finite: went back to the checkpoint "
            f"of step {run.step}; their data is skipped"
        )

    def _diverged(self, run: Run, report: StepReport) -> DivergedError:
        limit = run.guard.config.max_rollbacks
        tried = f"after {run.guard.rollbacks} of {limit} rollbacks"
        if run.guard.may_roll_back:
            tried = "and no checkpoint exists to go back to"
        cause = first_non_finite(run, report.microbatches)
        return DivergedError(
            f"{run.guard.streak} steps in a row were not finite {tried}; {cause}; samples {sample_ids(report)}",
            where=f"step {report.step}",
            fix="lower optimizer.learning_rate, lengthen the warm-up, or look at those samples",
        )


def sample_ids(report: StepReport) -> list[int]:
    """The rows a step was computed from."""
    return [sample for batch in report.microbatches for sample in batch.sample_ids]
