"""A linear map of a single row, as decoding one sequence has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b``: x ``[..., in]``, W ``[out, in]``, b ``[out]`` to ``[..., out]``.

    A single row in bf16 or fp16 on a CPU is a matter of reading W, and the matrix libraries read it at a fraction of
    the memory's rate. In a graph that is compiled without gradients it becomes a loop of products and fp32 sums
    instead, which the compiler turns into one pass over W. Everywhere else it is `torch.nn.functional.linear`.
    """
    one_row = x.numel() == x.shape[-1] and x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype
    if not (one_row and torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    y = (weight.float() * x.reshape(1, -1).float()).sum(-1)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)
