"""One optimizer update, on one screen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graft.data.batch import Batch
from graft.training.guard import Verdict
from graft.training.run import Run
from graft.training.totals import Totals


@dataclass(frozen=True)
class StepReport:
    """What one step was. Tensors stay on the device: whoever reads them waits for it.

    Args:
        step: its number, from 1.
        verdict: whether the update was made.
        loss: scalar, what was minimised: per target, auxiliary terms included.
        grad_norm: scalar, the gradients' global norm before clipping.
        learning_rate: peak rate times the schedule's factor.
        microbatches: the data it was computed from.
        seconds: wall time.
    """

    step: int
    verdict: Verdict
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    microbatches: Sequence[Batch]
    seconds: float


def train_step(run: Run) -> StepReport:
    """One update from ``global_batch_size`` sequences, in as many micro-batches as memory asks for."""
    started = time.perf_counter()
    microbatches = run.next_microbatches()
    totals = Totals.of(microbatches)  # denominators are known before any backward: N micro-batches equal one
    losses = []
    for batch in microbatches:
        terms = run.loss(batch)  # sums, never means
        loss = totals.share(terms)
        run.backward(loss)
        losses.append(loss.detach())
        totals.add({**terms.metrics, "aux": terms.aux})
        totals.count(terms.usage)
    loss, grad_norm = sum(losses[1:], losses[0]), run.gradient_norm()
    verdict = run.judge(loss, grad_norm)  # finite, or nothing is changed at all
    learning_rate = run.update(verdict, grad_norm)
    run.finish_step(verdict, totals)
    seconds = time.perf_counter() - started
    return StepReport(run.step, verdict, loss, grad_norm, learning_rate, microbatches, seconds)
