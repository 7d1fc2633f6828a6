"""Depthwise convolution over a few neighbouring positions, which never crosses a document's border."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.kernels import Kernels
from graft.shapes import Float, Int


class ConvState(NamedTuple):
    """What a causal convolution carries from one call to the next.

    Args:
        inputs_BJD: the last (K − 1) · dilation inputs, oldest first.
        segments_BJ: their document numbers; 0 = padding, or nothing yet.
    """

    inputs_BJD: Tensor
    segments_BJ: Tensor


def empty_conv_state(
    batch_size: int, channels: int, width: int, *, dilation: int = 1, device: torch.device, dtype: torch.dtype
) -> ConvState:
    """The state before the first position, for ``channels`` channels and kernels of ``width`` taps."""
    length = (width - 1) * dilation
    inputs_BJD = torch.zeros((batch_size, length, channels), device=device, dtype=dtype)
    return ConvState(inputs_BJD, torch.zeros((batch_size, length), device=device, dtype=torch.int64))


def behind_state(x_BTD: Tensor, segment_ids_BT: Tensor | None, state: ConvState) -> tuple[Tensor, Tensor, ConvState]:
    """What ``state`` has seen followed by the T positions that continue it, and the state after the last of them.

    Args:
        x_BTD: inputs.
        segment_ids_BT: document numbers, 0 = padding; None = one document (number 1) and no padding.
        state: the J inputs before.

    Returns:
        Inputs and document numbers of J + T positions, and the state after the last.
    """
    if segment_ids_BT is None:
        segment_ids_BT = state.segments_BJ.new_ones(x_BTD.shape[:2])
    x_BSD = torch.cat((state.inputs_BJD.to(x_BTD.dtype), x_BTD), dim=1)
    segments_BS = torch.cat((state.segments_BJ, segment_ids_BT.to(state.segments_BJ.dtype)), dim=1)
    T = x_BTD.shape[1]
    return x_BSD, segments_BS, ConvState(x_BSD[:, T:].to(state.inputs_BJD.dtype), segments_BS[:, T:])


def causal_conv(
    x_BTD: Float[Tensor, "B T D"],
    weight_DK: Float[Tensor, "D K"],
    bias_D: Float[Tensor, " D"] | None = None,
    segment_ids_BT: Int[Tensor, "B T"] | None = None,
    state: ConvState | None = None,
    *,
    dilation: int = 1,
    kernels: Kernels = "auto",
) -> tuple[Float[Tensor, "B T D"], ConvState | None]:
    """``y[t] = bias + Σ_i weight[:, i] ⊙ x[t − (K − 1 − i) · dilation]`` over the inputs of t's own document.

    An input of another document, of padding or before the first one counts as zero; padding itself gives the bias.

    Args:
        x_BTD: inputs.
        weight_DK: one kernel of K taps per channel, the last tap for the position itself.
        bias_D: added everywhere; None = nothing.
        segment_ids_BT: document numbers, 0 = padding; None = one document (number 1) and no padding.
        state: the T positions continue what it has seen; None = they are the first.
        dilation: positions from one tap to the next.
        kernels: ``reference`` forces the plain form.

    Returns:
        The sums in the dtype of x (products and sums are made in the wider of the dtypes of x and weight), and the
        state after the last position (None without one before).
    """
    reach = (weight_DK.shape[1] - 1) * dilation
    if state is not None:
        x_BTD, segment_ids_BT, state = behind_state(x_BTD, segment_ids_BT, state)
    form = reference_conv if kernels == "reference" else shifted_conv
    y_BTD = form(x_BTD, weight_DK, bias_D, segment_ids_BT, ahead=0, dilation=dilation)
    return (y_BTD if state is None else y_BTD[:, reach:]), state


def centred_conv(
    x_BTD: Float[Tensor, "B T D"],
    weight_DK: Float[Tensor, "D K"],
    bias_D: Float[Tensor, " D"] | None = None,
    segment_ids_BT: Int[Tensor, "B T"] | None = None,
    *,
    dilation: int = 1,
    kernels: Kernels = "auto",
) -> Float[Tensor, "B T D"]:
    """As `causal_conv`, looking as far ahead as back: tap K // 2 belongs to the position itself."""
    form = reference_conv if kernels == "reference" else shifted_conv
    ahead = (weight_DK.shape[1] - 1) // 2 * dilation
    return form(x_BTD, weight_DK, bias_D, segment_ids_BT, ahead=ahead, dilation=dilation)


def shifted_conv(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    segment_ids_BT: Tensor | None,
    *,
    ahead: int,
    dilation: int = 1,
) -> Tensor:
    """The sum, tap by tap, of shifted inputs; the last tap reads ``ahead`` positions later."""
    T, width = x_BTD.shape[1], weight_DK.shape[1]
    around = ((width - 1) * dilation - ahead, ahead)
    padded_BSD = F.pad(x_BTD, (0, 0, *around))
    segments_BS = None if segment_ids_BT is None else F.pad(segment_ids_BT, around)
    y_BTD = None if bias_D is None else bias_D.expand(x_BTD.shape)
    for tap in range(width):
        first = tap * dilation
        now_BTD = padded_BSD[:, first : first + T]
        if segments_BS is not None and segment_ids_BT is not None:
            same_BT = (segments_BS[:, first : first + T] == segment_ids_BT) & (segment_ids_BT != 0)
            now_BTD = now_BTD.masked_fill(~same_BT[..., None], 0.0)
        weight_D = weight_DK[:, tap]
        y_BTD = now_BTD * weight_D if y_BTD is None else torch.addcmul(*_alike(y_BTD, now_BTD, weight_D))
    assert y_BTD is not None
    return y_BTD.to(x_BTD.dtype)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the widest of their dtypes."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def reference_conv(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    segment_ids_BT: Tensor | None,
    *,
    ahead: int,
    dilation: int = 1,
) -> Tensor:
    """The definition: every pair of positions, the tap that joins them, and whether they share a document."""
    T, width = x_BTD.shape[1], weight_DK.shape[1]
    index_T = torch.arange(T, device=x_BTD.device)
    place_TS = index_T[None, :] - index_T[:, None] + (width - 1) * dilation - ahead
    tap_TS = place_TS.div(dilation, rounding_mode="floor")
    joined_BTS = ((tap_TS >= 0) & (tap_TS < width) & (place_TS % dilation == 0))[None]
    if segment_ids_BT is not None:
        same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        joined_BTS = joined_BTS & same_BTS & (segment_ids_BT != 0)[:, :, None]
    weight_DTS = weight_DK[:, tap_TS.clamp(0, width - 1)]
    weight_BDTS = torch.where(joined_BTS[:, None], weight_DTS, 0.0)
    y_BTD = torch.einsum("bdts,bsd->btd", *_alike(weight_BDTS, x_BTD))
    return (y_BTD if bias_D is None else y_BTD + bias_D).to(x_BTD.dtype)
