"""The Triton scan of mamba-ssm behind Mamba-2 (package ``mamba_ssm``, Apache-2.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.config.registry import resolve
from graft.ops.documents import Documents


def selective_scan(
    x_BTNF: Tensor,
    step_BTN: Tensor,
    rate_N: Tensor,
    B_BTKH: Tensor,
    C_BTKH: Tensor,
    documents: Documents | None,
    *,
    chunk_size: int,
) -> Tensor:
    """``S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t x_tᵀ, y_t = S_tᵀ C_t``: [B, T, N, F] in the dtype of x.

    Args:
        x_BTNF: inputs.
        step_BTN: Δ, in fp32.
        rate_N: A, below 0.
        B_BTKH: what the state is written with, per group.
        C_BTKH: what it is read with.
        documents: borders and padding; padding has Δ = 0, so that it changes nothing.
        chunk_size: positions per chunk; rounded up to a power of two of at least 16, which the kernel wants.
    """
    scan = resolve("mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined")
    numbers = None
    if documents is not None:
        step_BTN = step_BTN.masked_fill(~documents.real_BT[..., None], 0.0)
        numbers = documents.run_BT.to(torch.int32)
    dtype = x_BTNF.dtype
    size = max(16, 1 << (chunk_size - 1).bit_length())
    operands = (B_BTKH.to(dtype).contiguous(), C_BTKH.to(dtype).contiguous())
    return scan(
        x_BTNF.contiguous(), step_BTN.float().contiguous(), rate_N.float(), *operands, chunk_size=size, seq_idx=numbers
    )
