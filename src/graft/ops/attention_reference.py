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
    scores_BNTS = reference_scores(q_BTNH, k_BSKH, visibility, scoring)
    seen = visibility.block(0, q_BTNH.shape[1], 0, k_BSKH.shape[1], q_BTNH.device)
    if seen is not None:
        scores_BNTS = scores_BNTS.masked_fill(~seen[:, None], torch.finfo(scores_BNTS.dtype).min)
    p_BNTS = torch.softmax(scores_BNTS, dim=-1)
    if seen is not None:  # a row that is hidden as a whole came out uniform
        p_BNTS = p_BNTS.masked_fill(~seen[:, None], 0.0)
    p_BNTS = F.dropout(p_BNTS, dropout)
    return weighted_values(p_BNTS, v_BSKH).to(q_BTNH.dtype)


def reference_scores(q_BTNH: Tensor, k_BSKH: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """[B, N, T, S] scores of all pairs, hidden ones too, in fp32 at least."""
    T, S, group = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
    dtype = torch.promote_types(q_BTNH.dtype, torch.float32)
    k_BSNH = k_BSKH.to(dtype).repeat_interleave(group, dim=2)
    away_TS = distances(visibility.offset, 0, T, 0, S, q_BTNH.device).to(dtype)
    scores_BNTS = faded_products(q_BTNH.to(dtype), k_BSNH, away_TS, scoring.rates_H) * scoring.scale
    if scoring.softcap is not None:
        scores_BNTS = scoring.softcap * torch.tanh(scores_BNTS / scoring.softcap)
    if scoring.slopes_N is not None:
        scores_BNTS = scores_BNTS - scoring.slopes_N.to(dtype)[:, None, None] * away_TS
    return scores_BNTS


def weighted_values(p_BNTS: Tensor, v_BSKH: Tensor) -> Tensor:
    """[B, T, N, H] sums of values, in the dtype of the weights."""
    v_BSNH = v_BSKH.to(p_BNTS.dtype).repeat_interleave(p_BNTS.shape[1] // v_BSKH.shape[2], dim=2)
    return torch.einsum("bnts,bsnh->btnh", p_BNTS, v_BSNH)


def faded_products(q_BTNH: Tensor, k_BSNH: Tensor, away_TS: Tensor, rates_H: Tensor | None) -> Tensor:
    """[B, N, T, S]: ``Σ_c q_c · k_c · e^(−rate_c · distance)``, plain q·k without rates."""
    if rates_H is None:
        return torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    channels = zip(q_BTNH.unbind(-1), k_BSNH.unbind(-1), rates_H.to(away_TS.dtype), strict=True)
    faded = [torch.einsum("btn,bsn->bnts", q, k) * torch.exp(-rate * away_TS) for q, k, rate in channels]
    return torch.stack(faded).sum(0)
