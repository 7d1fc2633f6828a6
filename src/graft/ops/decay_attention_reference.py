"""The plain forms of attention with decay: the recurrence itself, and the sum over all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.ops.documents import Documents, forgetting


def recurrent_decay_attention(
    q_BTKH: Tensor,
    k_BTKH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTN: Tensor,
    *,
    documents: Documents | None = None,
    state_BNHF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t``, position by position in fp32 or wider.

    Arguments and results as in `graft.ops.decay_attention.decay_attention`. A document begins with S = 0; padding
    changes nothing.
    """
    B, T, N, F = v_BTNF.shape
    wide = torch.promote_types(v_BTNF.dtype, torch.float32)
    heads = N // q_BTKH.shape[2]
    q_BTNH, k_BTNH = (x.to(wide).repeat_interleave(heads, dim=2) for x in (q_BTKH, k_BTKH))
    decay_BTN = forgetting(log_decay_BTN.to(wide).expand(B, T, N), documents).exp()
    if documents is not None:
        k_BTNH = k_BTNH.masked_fill(~documents.real_BT[..., None, None], 0.0)
    S_BNHF = q_BTNH.new_zeros(B, N, q_BTNH.shape[-1], F) if state_BNHF is None else state_BNHF.to(wide)
    outputs: list[Tensor] = []
    for t in range(T):
        added_BNHF = k_BTNH[:, t, :, :, None] * v_BTNF[:, t, :, None].to(wide)
        S_BNHF = decay_BTN[:, t, :, None, None] * S_BNHF + added_BNHF
        outputs.append((q_BTNH[:, t, :, :, None] * S_BNHF).sum(-2))  # no matrix product: autocast would round it
    return torch.stack(outputs, dim=1).to(v_BTNF.dtype), S_BNHF


def parallel_decay_attention(
    q_BTKH: Tensor,
    k_BTKH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTN: Tensor,
    *,
    documents: Documents | None = None,
) -> Tensor:
    """``y_n = Σ_{m <= n} exp(Σ_{m < i <= n} log_decay_i) (q_n·k_m) v_m`` with all pairs at once: quadratic in T."""
    B, T, N, _ = v_BTNF.shape
    wide = torch.promote_types(v_BTNF.dtype, torch.float32)
    heads = N // q_BTKH.shape[2]
    q_BTNH, k_BTNH = (x.repeat_interleave(heads, dim=2) for x in (q_BTKH, k_BTKH))
    log_decay_BTN = log_decay_BTN.to(wide).expand(B, T, N)
    seen_BTT = torch.ones(1, T, T, dtype=torch.bool, device=q_BTKH.device).tril()
    if documents is not None:
        log_decay_BTN = log_decay_BTN.masked_fill(~documents.real_BT[..., None], 0.0)
        same_BTT = documents.run_BT[:, :, None] == documents.run_BT[:, None, :]
        seen_BTT = seen_BTT & same_BTT & documents.real_BT[:, None, :]
    sums_BNT = log_decay_BTN.cumsum(1).mT
    differences_BNTT = sums_BNT[..., :, None] - sums_BNT[..., None, :]
    decay_BNTT = differences_BNTT.masked_fill(~seen_BTT[:, None], -torch.inf).exp()
    weights_BNTT = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) * decay_BNTT
    return torch.einsum("bnts,bsnf->btnf", weights_BNTT.to(v_BTNF.dtype), v_BTNF).to(v_BTNF.dtype)
