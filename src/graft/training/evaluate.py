"""Loss on the fixed held-out rows, without a trace in the training that goes on afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from graft.data.loader import validation_batches
from graft.training.rng import preserved_rng
from graft.training.run import Run
from graft.training.totals import Totals


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) without gradients; puts training mode and every random generator back."""
    was_training = model.training
    model.eval()
    try:
        with preserved_rng(), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(run: Run) -> dict[str, float | None]:
    """Held-out ``loss`` (nats per target), ``perplexity``, ``bpb`` and the objective's other means.

    Computed in the run's precision over the same rows every time. The targets' number is in ``num_targets``.
    """
    totals = Totals()
    with evaluating(run.model):
        for batch in validation_batches(run.prepared, run.experiment):
            terms = run.loss(batch.to(run.device))
            totals.merge(Totals.of([batch]))
            totals.add(terms.metrics)
    return {**totals.means(), "num_targets": totals.num_targets}
