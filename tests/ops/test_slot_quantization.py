"""Rounding to 8 and 4 bits: what is stored, how far it is off, packing, and the gradient that passes it."""

from __future__ import annotations

import pytest
import torch

from graft.ops.slot_quantization import (
    Bits,
    dequantize_rows,
    fake_quantize_rows,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 4, 1])
def test_off_by_half_a_step_at_most(bits: Bits, group_size: int | None) -> None:
    x = torch.randn(20, 8, dtype=torch.float64)
    rows = quantize_rows(x, bits, group_size)
    groups = x.unflatten(1, (-1, group_size or 8))
    steps = groups.abs().amax(-1) / (127 if bits == 8 else 7)
    torch.testing.assert_close(rows.scales_MG, steps)
    off = (dequantize_rows(rows) - x).abs().unflatten(1, (-1, group_size or 8))
    assert (off <= steps[..., None] * 0.5000001).all()
    if group_size == 1:
        torch.testing.assert_close(dequantize_rows(rows), x)
    else:
        assert off.max() > 0.2 * steps.min()


def test_known_codes() -> None:
    x = torch.tensor([[7.0, -7.0, 2.4, -2.6], [0.0, 0.0, 0.0, 0.0]])
    assert unpack_nibbles(quantize_rows(x, 4).codes).tolist() == [[7, -7, 2, -3], [0, 0, 0, 0]]
    assert quantize_rows(x * 127 / 7, 8).codes[0].tolist() == [127, -127, 44, -47]
    assert not dequantize_rows(quantize_rows(x, 4))[1].any()


def test_bytes() -> None:
    x = torch.randn(6, 8)
    assert quantize_rows(x, 8).codes.nbytes == 6 * 8
    assert quantize_rows(x, 4).codes.nbytes == 6 * 8 // 2


def test_packing_keeps_every_code() -> None:
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_straight_through(bits: Bits) -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    y = fake_quantize_rows(x, bits, 3)
    torch.testing.assert_close(y, dequantize_rows(quantize_rows(x.detach(), bits, 3)), rtol=1e-15, atol=1e-15)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, upstream)
