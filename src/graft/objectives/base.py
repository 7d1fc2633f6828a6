"""What an objective is: a batch and a model in, sums out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graft.data.batch import IGNORED_TARGET, Batch
from graft.model import Model
from graft.ops.cross_entropy import CrossEntropySums, linear_cross_entropy
from graft.shapes import Float, Int


@dataclass(frozen=True)
class LossTerms:
    """Sums, never means: the step divides by denominators it knows before any backward pass.

    Args:
        main: differentiable sum over the batch's targets; divided by the step's ``num_targets``.
        aux: differentiable sum over the batch's positions; divided by the step's ``num_positions``. Zero without parts
            that have auxiliary terms. Never part of perplexity or bits per byte.
        metrics: detached sums over targets, by name.
        usage: the model's counts (`graft.model.Features.usage`).
    """

    main: Tensor
    aux: Tensor
    metrics: Mapping[str, Tensor]
    usage: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Objective(ABC):
    """What is predicted and how the loss is summed."""

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> LossTerms:
        """Runs the model on the batch and sums up its losses."""


def aux_total(aux: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The parts' auxiliary sums added up, zero when there are none.

    A part multiplies its sums by its own coefficients, so that a new kind of term needs nothing here.
    """
    return sum(aux.values(), start=torch.zeros_like(like))


def plain_cross_entropy(model: Model, batch: Batch) -> LossTerms:
    """Cross-entropy of every target, whatever the model sees of it, with the parts' auxiliary sums.

    Trains nothing useful in an encoder, but takes the time and memory of an objective that would: an encoder is priced
    and examined by this where its objective refuses it (``supports_bidirectional``).
    """
    features = model.features(batch.input_ids_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT)
    sums = predict(model, features.x_BTD, batch.targets_BT, z_loss_coef=0.0)
    return LossTerms(sums.loss, aux_total(features.aux, sums.loss), {"ce": sums.ce}, features.usage)


def predict(
    model: Model, x_BTD: Float[Tensor, "B T D"], targets_BT: Int[Tensor, "B T"], *, z_loss_coef: float
) -> CrossEntropySums:
    """Cross-entropy of the model's head on features, the way the model's runtime settings say."""
    execution = model.execution
    return linear_cross_entropy(
        model.head_features(x_BTD).flatten(0, 1),
        model.head_weight(),
        targets_BT.flatten(),
        bias_V=model.head.bias,
        vocab_size=model.vocab_size,
        softcap=model.head.softcap,
        z_loss_coef=z_loss_coef,
        ignore_index=IGNORED_TARGET,
        chunk_bytes=execution.loss_chunk_bytes,
        compile=execution.compile,
        kernels=execution.kernels,
    )
