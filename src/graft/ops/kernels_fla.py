"""flash-linear-attention's Triton kernels behind graft's operations (package ``fla``, MIT).

Its chunked kernels know packed documents as one long row with borders (`packed_row`), scale scores themselves unless
told otherwise, and start every document with an empty memory, so that graft's logarithms of −∞ at borders become 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.config.registry import resolve
from graft.ops.documents import Documents, begins


def packed_row(documents: Documents | None, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Rows [B, T, …] laid end to end as [1, B·T, …], and where documents begin, with B·T as the last: [documents + 1].

    Without documents the rows stay as they are, and there are no borders.
    """
    if documents is None:
        return tensors, None
    starts_BT = begins(documents).clone()
    starts_BT[:, 0] = True
    starts = starts_BT.flatten().nonzero()[:, 0]
    borders = F.pad(starts, (0, 1), value=starts_BT.numel()).to(torch.int64)
    return tuple(x.flatten(0, 1)[None] for x in tensors), borders


def _operands(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype).contiguous() for x in tensors)


def _whole_blocks(v_BTNF: Tensor) -> Tensor:
    """Values filled up with zero channels to a multiple of 16, the kernels' smallest block."""
    return F.pad(v_BTNF, (0, -v_BTNF.shape[-1] % 16))


def decay_attention(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNF: Tensor, log_decay_BTN: Tensor, documents: Documents | None
) -> Tensor:
    """`graft.ops.decay_attention.decay_attention` without a state: [B, T, N, F]."""
    chunk_simple_gla = resolve("fla.ops.simple_gla:chunk_simple_gla")
    shape, dtype = v_BTNF.shape, v_BTNF.dtype
    log_decay_BTN = log_decay_BTN.float().expand(*shape[:3])
    if documents is not None:
        k_BTNH = k_BTNH.masked_fill(~documents.real_BT[..., None, None], 0.0)
        log_decay_BTN = log_decay_BTN.masked_fill(~documents.real_BT[..., None], 0.0)
    tensors, borders = packed_row(documents, (q_BTNH, k_BTNH, _whole_blocks(v_BTNF), log_decay_BTN))
    q, k, v = _operands(dtype, *tensors[:3])
    y, _ = chunk_simple_gla(q, k, v, g=tensors[3].contiguous(), scale=1.0, cu_seqlens=borders)
    return y.reshape(*shape[:3], -1)[..., : shape[-1]]


def gated_linear_attention(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNF: Tensor, log_decay_BTNH: Tensor, documents: Documents | None
) -> Tensor:
    """`graft.ops.gated_linear_attention.gated_linear_attention` without a state: [B, T, N, F]."""
    chunk_gla = resolve("fla.ops.gla:chunk_gla")
    shape, dtype = v_BTNF.shape, v_BTNF.dtype
    tensors, borders = packed_row(documents, (q_BTNH, k_BTNH, _whole_blocks(v_BTNF), _finite(log_decay_BTNH)))
    q, k, v = _operands(dtype, *tensors[:3])
    y, _ = chunk_gla(q, k, v, g=tensors[3].contiguous(), scale=1.0, cu_seqlens=borders)
    return y.reshape(*shape[:3], -1)[..., : shape[-1]]


def gated_delta_rule(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTN: Tensor,
    beta_BTN: Tensor,
    documents: Documents | None,
) -> Tensor:
    """`graft.ops.gated_delta_rule.gated_delta_rule` without a state: [B, T, N, F]."""
    chunk_gated_delta_rule = resolve("fla.ops.gated_delta_rule:chunk_gated_delta_rule")
    shape, dtype = v_BTNF.shape, v_BTNF.dtype
    given = (q_BTNH, k_BTNH, _whole_blocks(v_BTNF), beta_BTN, _finite(log_decay_BTN))
    tensors, borders = packed_row(documents, given)
    q, k, v, beta = _operands(dtype, *tensors[:4])
    y, _ = chunk_gated_delta_rule(q, k, v, g=tensors[4].contiguous(), beta=beta, scale=1.0, cu_seqlens=borders)
    return y.reshape(*shape[:3], -1)[..., : shape[-1]]


def _finite(log_decay: Tensor) -> Tensor:
    """fp32, with 0 for −∞: what it forgets at the beginning of a document is empty."""
    return log_decay.float().masked_fill(log_decay.isneginf(), 0.0)
