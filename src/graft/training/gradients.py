"""The gradients of a step as plain tensors, whether a parameter's gradient is dense or holds some rows only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from graft.ops.row_gradients import coalesce_rows, split_rows


def gradient_values(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The numbers of every gradient there is, to be read or changed in place.

    Of a row gradient they are the values of its rows; rows that occur several times (one per micro-batch) are added
    first, so that norms are those of the whole gradient.
    """
    values: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = coalesce_rows(parameter.grad)
            values.append(split_rows(parameter.grad)[1])
        else:
            values.append(parameter.grad)
    return values


def scale_to_norm(values: list[Tensor], largest: float, norm: Tensor) -> None:
    """Multiplies all gradients by one factor, so that their global norm, now ``norm``, is at most ``largest``."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_(values, factor)
