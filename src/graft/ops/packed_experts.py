"""Two-bit matrices of many experts, each multiplied with its own rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.autocast import full_precision
from graft.ops.grouped_linear import grouped_linear
from graft.ops.kernels import Kernels
from graft.ops.ternary import PER_BYTE, Quantised, int8_rows, unpack_codes


def packed_grouped_linear(
    x_MD: Tensor,
    packed_EFJ: Tensor,
    scale_E11: Tensor,
    expert_M: Tensor,
    ends_E: Tensor,
    *,
    kernels: Kernels = "auto",
) -> Tensor:
    """``quantised(x) W_eᵀ`` for every row, e its expert; [M, F] in the dtype of x.

    As `graft.ops.ternary.packed_linear`: a product of whole numbers per two-bit place of the bytes, exact before the
    scales. They are multiplied as floats (fp32 or wider, whose sums of such numbers are exact too), a quarter of the
    matrices at a time; of more experts than rows only those that have rows.

    Args:
        x_MD: rows, sorted by expert.
        packed_EFJ: bytes of `graft.ops.ternary.pack_codes`.
        scale_E11: a factor per matrix.
        expert_M: the expert of each row.
        ends_E: int32, the row after each expert's last one.
        kernels: "reference" multiplies unpacked floats, expert by expert.
    """
    if kernels == "reference":
        codes_EFD = unpack_codes(packed_EFJ, x_MD.shape[-1]).to(scale_E11.dtype)
        weight_EFD = Quantised(codes_EFD, scale_E11).value(x_MD.dtype)
        return grouped_linear(int8_rows(x_MD).value(x_MD.dtype), weight_EFD, ends_E, kernels="reference")
    rows, num_bytes = int8_rows(x_MD), packed_EFJ.shape[-1]
    factor_M1 = rows.scale * scale_E11[expert_M, 0].to(rows.scale.dtype)
    if len(x_MD) < len(packed_EFJ):
        packed_EFJ = packed_EFJ.index_select(0, expert_M)
        ends_E = torch.arange(1, len(x_MD) + 1, dtype=torch.int32, device=x_MD.device)
    codes = F.pad(rows.codes, (0, num_bytes * PER_BYTE - x_MD.shape[-1]))
    sums_MF = -codes.sum(-1, keepdim=True)
    with full_precision(x_MD.device):
        for place, run in enumerate(codes.split(num_bytes, dim=-1)):
            digits_EFJ = ((packed_EFJ >> (2 * place)) & 3).to(run.dtype)
            sums_MF = sums_MF + grouped_linear(run, digits_EFJ, ends_E)
    return (sums_MF * factor_M1).to(x_MD.dtype)
