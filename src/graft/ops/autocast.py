"""What automatic mixed precision does to operations, and computing at full precision inside its region."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Operations keep the dtypes of their operands, autocast or not (the meta device knows no autocast)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product with ``x`` is made in: autocast's where it is on (it leaves fp64 alone), else x's."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def matmul_operand(x: Tensor) -> Tensor:
    """What autocast makes of an operand of a matrix product."""
    return x.to(matmul_dtype(x))
