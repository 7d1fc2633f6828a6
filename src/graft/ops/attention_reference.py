"""Softmax attention as it is defined: one explicit mask, fp32 scores. Every other kernel must agree with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_mask import Scoring, Visibility, distances


def reference_attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    *,
    dropout: float,
) -> Tensor:
    """``softmax(cap(scale·q·k) − slope·|i − j|) v`` over the visible keys; a query that sees none gives zeros.

    Time and memory O(T·S) in fp32 (fp64 inputs stay fp64). Arguments as in `graft.ops.attention.attention`.

    Returns:
        [B, T, N, H] in the dtype of q.
    """
    T, S, group = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
    dtype = torch.promote_types(q_BTNH.dtype, torch.float32)
    q_BTNH, out_dtype = q_BTNH.to(dtype), q_BTNH.dtype
    k_BSNH, v_BSNH = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k_BSKH, v_BSKH))
    away = distances(visibility.offset, 0, T, 0, S, q_BTNH.device).to(dtype)
    scores_BNTS = _products(q_BTNH, k_BSNH, away, scoring.rates_H) * scoring.scale
    if scoring.softcap is not None:
        scores_BNTS = scoring.softcap * torch.tanh(scores_BNTS / scoring.softcap)
    if scoring.slopes_N is not None:
        scores_BNTS = scores_BNTS - scoring.slopes_N.to(dtype)[:, None, None] * away
    seen = visibility.block(0, T, 0, S, q_BTNH.device)
    if seen is not None:
        scores_BNTS = scores_BNTS.masked_fill(~seen[:, None], torch.finfo(dtype).min)
    p_BNTS = torch.softmax(scores_BNTS, dim=-1)
    if seen is not None:  # a row that is hidden as a whole came out uniform
        p_BNTS = p_BNTS.masked_fill(~seen[:, None], 0.0)
    p_BNTS = F.dropout(p_BNTS, dropout)
    return torch.einsum("bnts,bsnh->btnh", p_BNTS, v_BSNH).to(out_dtype)


def _products(q_BTNH: Tensor, k_BSNH: Tensor, away_TS: Tensor, rates_H: Tensor | None) -> Tensor:
    """[B, N, T, S]: ``Σ_c q_c · k_c · e^(−rate_c · distance)``, plain q·k without rates."""
    if rates_H is None:
        return torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    channels = zip(q_BTNH.unbind(-1), k_BSNH.unbind(-1), rates_H.to(away_TS.dtype), strict=True)
    faded = [torch.einsum("btn,bsn->bnts", q, k) * torch.exp(-rate * away_TS) for q, k, rate in channels]
    return torch.stack(faded).sum(0)
