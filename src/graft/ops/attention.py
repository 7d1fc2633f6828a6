"""Softmax attention: one function, and the choice of the kernel that computes it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_banded import BLOCK, banded_attention
from graft.ops.attention_folded import Scoring, folded_attention
from graft.ops.attention_mask import Visibility
from graft.ops.attention_reference import reference_attention
from graft.ops.autocast import full_precision, matmul_operand
from graft.ops.kernels import Kernel as OutsideKernel
from graft.ops.outside_graphs import outside_graphs
from graft.shapes import Float, Int

Kernels = Literal["auto", "reference"]
"""``runtime.kernels``: the fastest kernel that fits, or the plain definition."""

Kernel = Literal["reference", "folded", "banded", "sdpa"]

FOLDED_BELOW = 512
"""Query positions from which blocks beat one product over the whole square on a CPU."""

SDPA_FROM = 2048
"""Query positions from which PyTorch's fused kernel beats the blocks on a CPU: fp32, all keys, no extras."""


def choose_kernel(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    *,
    v_head_dim: int | None = None,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
) -> Kernel:
    """The kernel `attention` uses; all agree in values and gradients, and all support dropout.

    ``reference`` on request; ``sdpa`` (PyTorch's fused kernel, which knows only plain or wholly causal attention) on
    accelerators and for long fp32 sequences; ``banded`` for what is long, or limited by a window over more than one
    block; ``folded`` for the rest. Shapes alone decide: the same on the meta device as on a CPU. Values of another
    width than keys (``v_head_dim``, None = the same) keep a CPU from its fused kernel, which cannot have them.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    one_width = v_head_dim is None or v_head_dim == q_BTNH.shape[-1]
    if kernels == "reference":
        return "reference"
    if _fused_can(T, S, visibility, scoring):
        on_cpu = q_BTNH.device.type in ("cpu", "meta")
        if not on_cpu or (one_width and T >= SDPA_FROM and q_BTNH.dtype == torch.float32 and dropout == 0.0):
            return "sdpa"
    limited = visibility.window is not None and visibility.window < S
    return "banded" if T >= FOLDED_BELOW or (limited and T > BLOCK) else "folded"


def _fused_can(T: int, S: int, visibility: Visibility, scoring: Scoring) -> bool:
    """Whether `torch.nn.functional.scaled_dot_product_attention` can express this without a mask tensor."""
    if scoring.softcap is not None or scoring.slopes_N is not None or scoring.rates_H is not None:
        return False
    if visibility.query_segments_BT is not None or visibility.window is not None:
        return False
    return not visibility.causal or (T == S and visibility.offset == 0) or (T == 1 and visibility.offset == S - 1)


def attention(
    q_BTNH: Float[Tensor, "B T N H"],
    k_BSKH: Float[Tensor, "B S K H"],
    v_BSKH: Float[Tensor, "B S K v_head_dim"],
    *,
    scale: float,
    causal: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    offset: int | None = None,
    query_segments_BT: Int[Tensor, "B T"] | None = None,
    key_segments_BS: Int[Tensor, "B S"] | None = None,
    slopes_N: Float[Tensor, " N"] | None = None,
    rates_H: Float[Tensor, " H"] | None = None,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
    kernel: OutsideKernel | None = None,
) -> Float[Tensor, "B T N v_head_dim"]:
    """``softmax(cap(scale·q·k) − slope·|i − j|) v`` over the keys a query may see; see `Scoring` for scores.

    Under autocast q, k and v are cast to its dtype; softmax statistics are fp32 in every kernel.

    Args:
        q_BTNH: queries, N = K·G heads; head n reads key head n // G.
        k_BSKH: keys.
        v_BSKH: values, which may have more or fewer channels than keys.
        scale: factor on q·k.
        causal: hide keys after the query.
        sliding_window: hide keys at a distance of this many or more (a query counts itself); None = no limit.
        softcap: c in c·tanh(score/c), before distance and mask; None = no cap.
        offset: index of query 0 among the keys; None = S - T (the queries are the last of the keys).
        query_segments_BT: document numbers of the queries, 0 = padding; a query sees its own document alone.
        key_segments_BS: document numbers of the keys; given exactly when the queries' are.
        slopes_N: constants (no gradient), the distance penalty of each head; None = none.
        rates_H: constants ≥ 0 (no gradient), the rates at which channels of q·k fade with distance; None = none does.
        dropout: rate of probabilities dropped (the rest is scaled up); 0 outside training.
        kernels: ``reference`` forces the plain definition.
        kernel: computes whole sequences where PyTorch's fused kernel cannot; None = graft's own.

    Returns:
        In the dtype of q (autocast's under autocast). A query that sees no key (padding) gives zeros, and no gradient.
    """
    assert (query_segments_BT is None) == (key_segments_BS is None), "segments of queries and keys go together"
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    offset = S - T if offset is None else offset
    if sliding_window is not None and sliding_window >= max(S, T + offset, S - offset):
        sliding_window = None  # it hides nothing
    visibility = Visibility(causal, sliding_window, offset, query_segments_BT, key_segments_BS)
    scoring = Scoring(scale, softcap, slopes_N, rates_H)
    q_BTNH, k_BSKH, v_BSKH = (matmul_operand(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    if kernel is not None and T == S and dropout == 0.0 and not _fused_can(T, S, visibility, scoring):
        with full_precision(q_BTNH.device):
            return outside_graphs(kernel.run)(q_BTNH, k_BSKH, v_BSKH, visibility, scoring)
    width = v_BSKH.shape[-1]
    form = choose_kernel(q_BTNH, k_BSKH, visibility, scoring, v_head_dim=width, dropout=dropout, kernels=kernels)
    with full_precision(q_BTNH.device):  # the kernels choose dtypes themselves
        match form:
            case "reference":
                return reference_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, dropout=dropout)
            case "folded":
                return folded_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, dropout=dropout)
            case "banded":
                return banded_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, dropout=dropout)
            case "sdpa":
                return _sdpa(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, dropout=dropout)


def _sdpa(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring, *, dropout: float
) -> Tensor:
    """PyTorch's fused kernel, where `_fused_can`. A single query that sees all keys needs no mask."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        dropout_p=dropout,
        is_causal=visibility.causal and q_BTNH.shape[1] > 1,
        scale=scoring.scale,
        enable_gqa=True,
    )
    return out_BNTH.transpose(1, 2)
