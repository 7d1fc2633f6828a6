"""Softmax attention: one function, and the choice of the form that computes it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_banded import BLOCK, banded_attention
from graft.ops.attention_folded import folded_attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.attention_reference import reference_attention
from graft.ops.autocast import full_precision, matmul_operand
from graft.ops.kernels import Kernel, Kernels
from graft.ops.outside_graphs import outside_graphs
from graft.shapes import Float

Form = Literal["reference", "folded", "banded", "sdpa"]
"""How `attention` is computed: by the definition, as one block, block by block, or by PyTorch's fused kernel."""

FOLDED_BELOW = 512
"""Query positions from which blocks beat one product over the whole square on a CPU."""

SDPA_FROM = 2048
"""Query positions from which PyTorch's fused kernel beats the blocks on a CPU: fp32, all keys, no extras."""


def choose_form(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    *,
    v_head_dim: int | None = None,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
) -> Form:
    """The form `attention` uses; all agree in values and gradients, and all support dropout.

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
    visibility: Visibility,
    scoring: Scoring,
    *,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
    kernel: Kernel | None = None,
) -> Float[Tensor, "B T N v_head_dim"]:
    """``softmax(scores) v`` over the keys a query may see.

    Under autocast q, k and v are cast to its dtype; softmax statistics are fp32 in every form.

    Args:
        q_BTNH: queries, N = K·G heads; head n reads key head n // G.
        k_BSKH: keys.
        v_BSKH: values, which may have more or fewer channels than keys.
        visibility: which keys a query sees.
        scoring: how q·k becomes a score.
        dropout: rate of probabilities dropped (the rest is scaled up); 0 outside training.
        kernels: ``reference`` forces the plain definition.
        kernel: computes whole sequences where PyTorch's fused kernel cannot; None = graft's own.

    Returns:
        In the dtype of q (autocast's under autocast). A query that sees no key (padding) gives zeros, and no gradient.
    """
    assert (visibility.query_segments_BT is None) == (visibility.key_segments_BS is None), "segments go together"
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    visibility = visibility.without_idle_window(T, S)
    q_BTNH, k_BSKH, v_BSKH = (matmul_operand(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    if kernel is not None and T == S and dropout == 0.0 and not _fused_can(T, S, visibility, scoring):
        with full_precision(q_BTNH.device):
            return outside_graphs(kernel.run)(q_BTNH, k_BSKH, v_BSKH, visibility, scoring)
    width = v_BSKH.shape[-1]
    form = choose_form(q_BTNH, k_BSKH, visibility, scoring, v_head_dim=width, dropout=dropout, kernels=kernels)
    with full_precision(q_BTNH.device):  # the forms choose dtypes themselves
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
