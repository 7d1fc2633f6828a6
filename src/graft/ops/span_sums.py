"""Sums of what lies between two columns of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.kernels import Kernels
from graft.shapes import Float, Int


def span_sums(
    x_BSE: Float[Tensor, "B S E"],
    first_BT: Int[Tensor, "B T"],
    last_BT: Int[Tensor, "B T"],
    *,
    kernels: Kernels = "auto",
) -> Float[Tensor, "B T E"]:
    """``y[t] = Σ x[s] for first[t] <= s < last[t]``, in the dtype of x; an empty span gives zero.

    The fast form takes differences of running sums, which are made in fp64 where the device has it: the sums of short
    spans late in a row would lose digits otherwise.

    Args:
        x_BSE: what is added up.
        first_BT: first column of each span.
        last_BT: the column behind it, not before ``first``.
        kernels: ``reference`` adds up every span by itself.
    """
    if kernels == "reference":
        columns_S = torch.arange(x_BSE.shape[1], device=x_BSE.device)
        inside_BTS = (columns_S >= first_BT[..., None]) & (columns_S < last_BT[..., None])
        return torch.einsum("bts,bse->bte", inside_BTS.to(x_BSE.dtype), x_BSE)
    wide = x_BSE.dtype if x_BSE.device.type == "mps" else torch.float64
    running_BSE = F.pad(x_BSE.cumsum(1, dtype=wide), (0, 0, 1, 0))
    ends = (index_BT[..., None].expand(-1, -1, x_BSE.shape[2]) for index_BT in (last_BT, first_BT))
    after_BTE, before_BTE = (running_BSE.gather(1, index_BTE) for index_BTE in ends)
    return (after_BTE - before_BTE).to(x_BSE.dtype)
