"""Ternary weights and 8-bit activations: quantisers, their straight-through forms, two-bit packing and its product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-5
"""Means and maxima below this count as this, so that zeros stay zeros."""

PER_BYTE = 4
"""Ternary codes in a byte."""


class Quantised(NamedTuple):
    """``codes · scale`` stands for a tensor.

    Args:
        codes: whole numbers in a floating dtype (fp32 or wider).
        scale: factors, of a shape that broadcasts.
    """

    codes: Tensor
    scale: Tensor

    def value(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for."""
        return (self.codes * self.scale).to(dtype)


def ternary(weight: Tensor) -> Quantised:
    """Codes −1, 0, 1 and one scale per matrix: ``round_clip(W / s, −1, 1)``, ``s = mean |W|`` (2402.17764, eqs. 1-3).

    Args:
        weight: [..., out, in]; leading axes are a batch of matrices (experts), each with a scale of its own.

    Returns:
        codes [..., out, in], scale [..., 1, 1].
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = wide.abs().mean(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST)
    return Quantised((wide / scale).round().clamp(-1, 1), scale)


def int8_rows(x: Tensor) -> Quantised:
    """Codes −127 … 127 and one scale per row of the last axis, its largest absolute value over 127.

    Args:
        x: [..., in].

    Returns:
        codes [..., in], scale [..., 1].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / 127
    return Quantised((wide / scale).round().clamp(-127, 127), scale)


def _straight_through(x: Tensor, quantised: Quantised, share: Tensor | None) -> Tensor:
    """``x`` moved ``share`` of the way to its quantised value; the gradient passes as if nothing had happened."""
    if share is None:
        value = quantised.value(x.dtype)
    else:  # lerp gives its ends exactly
        wide = x.detach().to(quantised.codes.dtype)
        value = torch.lerp(wide, quantised.value(wide.dtype), share.to(wide.dtype)).to(x.dtype)
    # what is added is exactly zero; a custom function would do without, and cannot be traced without warnings
    return value + (x - x.detach()) if torch.is_grad_enabled() else value


def fake_ternary(weight: Tensor, share: Tensor | None = None) -> Tensor:
    """The value of `ternary`, with the gradient of the identity (straight-through estimator, 1308.3432).

    Args:
        weight: [..., out, in], one matrix or a batch of them.
        share: scalar λ in [0, 1]: ``(1 − λ) · weight + λ · quantised``, exact at both ends; None = 1.
    """
    return _straight_through(weight, ternary(weight.detach()), share)


def fake_int8_rows(x: Tensor, share: Tensor | None = None) -> Tensor:
    """The value of `int8_rows`, with the gradient of the identity; ``share`` as in `fake_ternary`."""
    return _straight_through(x, int8_rows(x.detach()), share)


def pack_codes(codes: Tensor) -> Tensor:
    """Ternary codes [..., in] as bytes [..., ceil(in / 4)], two bits each; `unpack_codes` is exact.

    Byte j holds the codes j, j + n, j + 2n and j + 3n (n bytes), lowest bits first, so that unpacking writes four long
    runs.
    """
    num_bytes = -(-codes.shape[-1] // PER_BYTE)
    digits = F.pad((codes + 1).to(torch.uint8), (0, num_bytes * PER_BYTE - codes.shape[-1]))
    runs = digits.unflatten(-1, (PER_BYTE, num_bytes)).unbind(-2)
    packed = runs[0].clone()
    for place, run in enumerate(runs[1:], start=1):
        packed |= run << (2 * place)
    return packed


def unpack_codes(packed: Tensor, columns: int) -> Tensor:
    """int8 codes [..., columns] of `pack_codes`."""
    runs = [((packed >> (2 * place)) & 3).to(torch.int8) for place in range(PER_BYTE)]
    return torch.cat(runs, dim=-1)[..., :columns] - 1


def packed_linear_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``quantised(x) Wᵀ + b`` with W unpacked to the dtype of x: what `fake_int8_rows` and `fake_ternary` give.

    Args:
        x: [..., in].
        packed: [out, ceil(in / 4)].
        scale: [1, 1].
        bias: [out] or None.
    """
    codes = unpack_codes(packed, x.shape[-1]).to(scale.dtype)
    return F.linear(int8_rows(x).value(x.dtype), Quantised(codes, scale).value(x.dtype), bias)


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`packed_linear_reference` by products of whole numbers, exact before the scales; arguments as there.

    One product per two-bit place of the bytes: a place of all bytes is a run of columns (see `pack_codes`), and
    ``Σ x · (digit − 1) = Σ x · digit − Σ x``, so that the digits are used as they are masked out. On a CPU they stay
    int8; elsewhere they are multiplied as fp32, whose sums of such numbers are exact too.
    """
    rows, num_bytes = int8_rows(x.flatten(0, -2)), packed.shape[-1]
    codes = F.pad(rows.codes, (0, num_bytes * PER_BYTE - x.shape[-1]))
    sums = -codes.sum(-1, keepdim=True)
    whole = x.device.type == "cpu" and num_bytes > 1  # PyTorch 2.13 multiplies single columns of int8 wrongly
    for place, run in enumerate(codes.split(num_bytes, dim=-1)):
        digits = (packed >> (2 * place)) & 3
        if whole:
            products = torch._int_mm(run.to(torch.int8), digits.view(torch.int8).T)
        else:
            products = run @ digits.T.to(run.dtype)
        sums = sums + products
    y = sums * (rows.scale * scale.to(rows.scale.dtype))
    y = y if bias is None else y + bias
    return y.to(x.dtype).unflatten(0, x.shape[:-1])
