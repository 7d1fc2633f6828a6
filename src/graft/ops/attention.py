"""Softmax attention: one function, and the choice of the kernel that computes it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from graft.ops.attention_folded import Scoring, folded_attention
from graft.ops.attention_mask import Visibility
from graft.ops.attention_reference import reference_attention

Kernels = Literal["auto", "reference"]
"""``runtime.kernels``: the fastest kernel that fits, or the plain definition."""

Kernel = Literal["reference", "folded"]


def choose_kernel(kernels: Kernels) -> Kernel:
    """The kernel `attention` uses."""
    return "reference" if kernels == "reference" else "folded"


def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
    query_segments_BT: Tensor | None = None,
    key_segments_BS: Tensor | None = None,
    slopes_N: Tensor | None = None,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
) -> Tensor:
    """``softmax(cap(scale·q·k) − slope·|i − j|) v`` over the keys a query may see.

    Args:
        q_BTNH: queries, N = K·G heads; head n reads key head n // G.
        k_BSKH: keys.
        v_BSKH: values.
        scale: factor on q·k.
        causal: hide keys after the query.
        sliding_window: hide keys at a distance of this many or more (a query counts itself); None = no limit.
        softcap: c in c·tanh(score/c), before distance and mask; None = no cap.
        offset: index of query 0 among the keys; None = S - T (the queries are the last of the keys).
        query_segments_BT: document numbers of the queries, 0 = padding; a query sees its own document alone.
        key_segments_BS: document numbers of the keys; given exactly when the queries' are.
        slopes_N: fp32 constants, the distance penalty of each head; None = none.
        dropout: rate of probabilities dropped (the rest is scaled up); 0 outside training.
        kernels: ``reference`` forces the plain definition.

    Returns:
        [B, T, N, H]. A query that sees no key (padding) gives zeros, and zero gradients.
    """
    assert (query_segments_BT is None) == (key_segments_BS is None), "segments of queries and keys go together"
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    visibility = Visibility(
        causal, sliding_window, S - T if offset is None else offset, query_segments_BT, key_segments_BS
    )
    device_type = q_BTNH.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q_BTNH, k_BSKH, v_BSKH = q_BTNH.to(dtype), k_BSKH.to(dtype), v_BSKH.to(dtype)
    with torch.autocast(device_type, enabled=False):
        if choose_kernel(kernels) == "reference":
            return reference_attention(
                q_BTNH, k_BSKH, v_BSKH, visibility, scale=scale, softcap=softcap, slopes_N=slopes_N, dropout=dropout
            )
        scoring = Scoring(scale, softcap, slopes_N)
        return folded_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, dropout=dropout)
