"""Nonlinearities of channel mixers, by their name in configs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0)²`` (Primer, 2109.08668), element by element."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """``x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`` (GELU's approximation, 1606.08415), element by element.

    Compiled, as ``x·σ(2u)``, which is the same since ``(1 + tanh u)/2 = σ(2u)``: a vectorised exponential takes half
    the time of a vectorised tanh. Eager, as PyTorch's own single kernel.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    u = (2 / math.pi) ** 0.5 * (wide + 0.044715 * wide * wide * wide)
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
}
"""Name -> function of a tensor, element by element, same dtype out as in."""


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap·tanh(x / cap)``: nearly x while |x| is far below the cap, never beyond it (Gemma 2, 2408.00118)."""
    return cap * torch.tanh(x / cap)
