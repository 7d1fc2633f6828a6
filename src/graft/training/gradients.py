"""The gradients of a step as plain tensors, whether a parameter's gradient is dense or holds some rows only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from graft.ops.row_gradients import coalesce_rows, split_rows

if TYPE_CHECKING:
    from graft.model import Model


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


def tied_table(model: Model) -> nn.Parameter | None:
    """The embedding table, where it is the head's matrix too."""
    return model.embedding.weight if model.head.weight is None else None


def global_norm(values: list[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar on their device.

    On a CPU large tensors of long rows are reduced row by row first: PyTorch takes the norm of a whole tensor with one
    thread, those of rows with all.
    """
    return get_total_norm([torch.linalg.vector_norm(v, dim=-1) if _row_by_row(v) else v for v in values])


ROW_BY_ROW_FROM = 2**16
"""Numbers from which a gradient's norm is taken row by row on a CPU."""

SHORTEST_ROW = 64
"""Channels from which that pays: shorter rows leave too many norms to add up."""


def _row_by_row(values: Tensor) -> bool:
    large = values.numel() >= ROW_BY_ROW_FROM and values.dim() > 1
    return large and values.shape[-1] >= SHORTEST_ROW and values.device.type == "cpu"


def scale_to_norm(values: list[Tensor], largest: float, norm: Tensor) -> None:
    """Multiplies all gradients by one factor, so that their global norm, now ``norm``, is at most ``largest``."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_(values, factor)
