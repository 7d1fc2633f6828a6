"""PyTorch's FlexAttention behind graft's attention: windows, packed documents, soft caps and distance penalties."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from graft.ops.attention_mask import Scoring, Visibility


def flex_attention(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """`graft.ops.attention.attention` for scores without fading channels: [B, T, N, H of v].

    A query that sees no key gives zeros. Compiled on an accelerator; elsewhere PyTorch's plain form, forward only.
    """
    assert scoring.rates_H is None, "the kernel is not chosen for these"
    compiled = q_BTNH.device.type == "cuda"
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    batch = None if visibility.query_segments_BT is None else q_BTNH.shape[0]
    make, attend = _functions(compiled)
    mask = make(_sees(visibility), batch, None, T, S, device=q_BTNH.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = attend(q, k, v, score_mod=_score(visibility, scoring), block_mask=mask, scale=scoring.scale, enable_gqa=True)
    return cast(Tensor, out).transpose(1, 2)


@functools.cache
def _functions(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes masks, and what attends."""
    if not compiled:
        return torch_flex.create_block_mask, torch_flex.flex_attention
    return torch.compile(torch_flex.create_block_mask), torch.compile(torch_flex.flex_attention)


def _sees(visibility: Visibility) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`Visibility` for one pair."""
    queries, keys = visibility.query_segments_BT, visibility.key_segments_BS
    window, offset, causal = visibility.window, visibility.offset, visibility.causal

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:  # noqa: ARG001 (FlexAttention's signature)
        distance = t + offset - s
        seen = distance >= 0 if causal else distance == distance
        if window is not None:
            seen = seen & (distance < window) & (distance > -window)
        if queries is not None and keys is not None:
            seen = seen & (queries[b, t] == keys[b, s]) & (queries[b, t] != 0)
        return seen

    return sees


def _score(visibility: Visibility, scoring: Scoring) -> Callable[..., Tensor] | None:
    """`Scoring` after q·k was scaled; None = as it is."""
    cap, slopes_N, offset = scoring.softcap, scoring.slopes_N, visibility.offset
    if cap is None and slopes_N is None:
        return None

    def score(value: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:  # noqa: ARG001
        if cap is not None:
            value = cap * torch.tanh(value / cap)
        if slopes_N is not None:
            value = value - slopes_N[h] * (t + offset - s).abs()
        return value

    return score
