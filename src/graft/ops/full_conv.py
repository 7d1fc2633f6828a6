"""Convolution from all channels to all channels over a few neighbouring positions, never across a document's border."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.kernels import Kernels
from graft.ops.short_conv import ConvState, behind_state
from graft.shapes import Float, Int


def causal_full_conv(
    x_BTI: Float[Tensor, "B T I"],
    weight_OIK: Float[Tensor, "O I K"],
    bias_O: Float[Tensor, " O"] | None = None,
    segment_ids_BT: Int[Tensor, "B T"] | None = None,
    state: ConvState | None = None,
    *,
    kernels: Kernels = "auto",
) -> tuple[Float[Tensor, "B T O"], ConvState | None]:
    """``y[t] = bias + Σ_k weight[:, :, k] x[t − K + 1 + k]`` over the inputs of position t's own document.

    An input of another document, of padding or before the first one counts as zero; padding itself gives the bias.

    Args:
        x_BTI: inputs.
        weight_OIK: K matrices, the last one for the position itself.
        bias_O: added everywhere; None = nothing.
        segment_ids_BT: document numbers, 0 = padding; None = one document (number 1) and no padding.
        state: the T positions continue what it has seen; None = they are the first.
        kernels: ``reference`` forces the plain form.

    Returns:
        The sums in the dtype of x, and the state after the last position (None without one before).
    """
    form = reference_full_conv if kernels == "reference" else windowed_full_conv
    if state is None:
        return form(x_BTI, weight_OIK, bias_O, segment_ids_BT, ahead=0), None
    x_BSI, segments_BS, state = behind_state(x_BTI, segment_ids_BT, state)
    return form(x_BSI, weight_OIK, bias_O, segments_BS, ahead=0, skip=weight_OIK.shape[2] - 1), state


def centred_full_conv(
    x_BTI: Float[Tensor, "B T I"],
    weight_OIK: Float[Tensor, "O I K"],
    bias_O: Float[Tensor, " O"] | None = None,
    segment_ids_BT: Int[Tensor, "B T"] | None = None,
    *,
    kernels: Kernels = "auto",
) -> Float[Tensor, "B T O"]:
    """As `causal_full_conv`, looking as far ahead as back: matrix K // 2 belongs to the position itself."""
    form = reference_full_conv if kernels == "reference" else windowed_full_conv
    return form(x_BTI, weight_OIK, bias_O, segment_ids_BT, ahead=(weight_OIK.shape[2] - 1) // 2)


def windowed_full_conv(
    x_BSI: Tensor,
    weight_OIK: Tensor,
    bias_O: Tensor | None,
    segments_BS: Tensor | None,
    *,
    ahead: int,
    skip: int = 0,
) -> Tensor:
    """One product of the matrices, side by side, with each position's window of inputs.

    The last matrix reads ``ahead`` positions later; the first ``skip`` positions are inputs only.
    """
    width = weight_OIK.shape[2]
    before = width - 1 - ahead - skip
    assert before >= 0, "positions that are inputs only are those of a state"
    windows_BTIK = F.pad(x_BSI, (0, 0, before, ahead)).unfold(1, width, 1)
    if segments_BS is not None:
        own_BT1 = segments_BS[:, skip:, None]
        around_BTK = F.pad(segments_BS, (before, ahead)).unfold(1, width, 1)
        joined_BTK = (around_BTK == own_BT1) & (own_BT1 != 0)
        windows_BTIK = windows_BTIK.masked_fill(~joined_BTK[:, :, None], 0.0)
    return F.linear(windows_BTIK.flatten(2), weight_OIK.flatten(1), bias_O).to(x_BSI.dtype)


def reference_full_conv(
    x_BSI: Tensor,
    weight_OIK: Tensor,
    bias_O: Tensor | None,
    segments_BS: Tensor | None,
    *,
    ahead: int,
    skip: int = 0,
) -> Tensor:
    """The definition: every pair of positions, the matrix that joins them, and whether they share a document."""
    S, width = x_BSI.shape[1], weight_OIK.shape[2]
    index_S = torch.arange(S, device=x_BSI.device)
    tap_TS = index_S[None, :] - index_S[skip:, None] + (width - 1 - ahead)
    joined_BTS = ((tap_TS >= 0) & (tap_TS < width))[None]
    if segments_BS is not None:
        own_BT1 = segments_BS[:, skip:, None]
        joined_BTS = joined_BTS & (segments_BS[:, None, :] == own_BT1) & (own_BT1 != 0)
    weight_OITS = weight_OIK[:, :, tap_TS.clamp(0, width - 1)]
    y_BTO = torch.einsum("bts,oits,bsi->bto", joined_BTS.to(x_BSI.dtype), weight_OITS, x_BSI)
    return (y_BTO if bias_O is None else y_BTO + bias_O).to(x_BSI.dtype)
