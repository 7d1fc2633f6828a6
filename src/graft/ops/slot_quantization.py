"""Rows of numbers in 8 or 4 bits, with a scale for each group of channels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graft.shapes import Float

Bits = Literal[8, 4]

_NIBBLE_OFFSET = 8
"""Added to 4-bit codes, -7 … 7, so that they are stored as numbers without a sign."""


class QuantizedRows(NamedTuple):
    """Quantised rows.

    Args:
        codes: int8 [M, W] whole numbers of steps; of 4 bits uint8 [M, W / 2], two to a byte, the even channel low.
        scales_MG: step of each row and group of channels.
        bits: 8 or 4.
    """

    codes: Tensor
    scales_MG: Tensor
    bits: Bits


def quantize_rows(x_MW: Float[Tensor, "M W"], bits: Bits, group_size: int | None = None) -> QuantizedRows:
    """Rounds to the nearest of 255 (8 bits) or 15 (4 bits) steps from -absmax to absmax of a row's group of channels.

    Args:
        x_MW: rows.
        bits: 8 or 4; 4 needs an even W.
        group_size: channels that share a scale, a divisor of W; None = the whole row.
    """
    codes_MW, scales_MG = _codes(x_MW, bits, group_size)
    codes_MW = codes_MW.to(torch.int8)
    return QuantizedRows(pack_nibbles(codes_MW) if bits == 4 else codes_MW, scales_MG, bits)


def dequantize_rows(rows: QuantizedRows) -> Float[Tensor, "M W"]:
    """``code · scale`` in the dtype of the scales."""
    codes_MW = unpack_nibbles(rows.codes) if rows.bits == 4 else rows.codes
    groups_MGC = codes_MW.unflatten(1, (rows.scales_MG.shape[1], -1))
    return (groups_MGC.to(rows.scales_MG.dtype) * rows.scales_MG[..., None]).flatten(1)


def fake_quantize_rows(x_MW: Float[Tensor, "M W"], bits: Bits, group_size: int | None = None) -> Float[Tensor, "M W"]:
    """``dequantize(quantize(x))`` whose gradient is that of x (straight-through, 1308.3432)."""
    codes_MW, scales_MG = _codes(x_MW.detach(), bits, group_size)
    rounded_MW = (codes_MW.unflatten(1, (scales_MG.shape[1], -1)) * scales_MG[..., None]).flatten(1)
    return x_MW + (rounded_MW - x_MW.detach())


def _codes(x_MW: Tensor, bits: Bits, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Whole numbers of steps [M, W] and steps [M, G]; a group of zeros has the step 1."""
    x_MGC = x_MW.unflatten(1, (-1, group_size or x_MW.shape[1]))
    levels = 2 ** (bits - 1) - 1
    scales_MG = x_MGC.abs().amax(-1) / levels
    scales_MG = torch.where(scales_MG > 0, scales_MG, 1.0)
    return (x_MGC / scales_MG[..., None]).round().clamp(-levels, levels).flatten(1), scales_MG


def pack_nibbles(codes_MW: Tensor) -> Tensor:
    """int8 codes in -8 … 7, W even -> uint8 [M, W / 2]."""
    shifted_MW = (codes_MW + _NIBBLE_OFFSET).to(torch.uint8)
    return shifted_MW[:, 0::2] | (shifted_MW[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """What `pack_nibbles` packed, int8."""
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return pairs.flatten(1).to(torch.int8) - _NIBBLE_OFFSET
