"""Nonlinearities of channel mixers, by their name in configs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0)²`` (Primer, 2109.08668), element by element."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
}
"""Name -> function of a tensor, element by element, same dtype out as in."""


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap·tanh(x / cap)``: nearly x while |x| is far below the cap, never beyond it (Gemma 2, 2408.00118)."""
    return cap * torch.tanh(x / cap)
