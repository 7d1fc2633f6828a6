"""Quantisers, straight-through gradients, packing, and the product of whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.ops.ternary import (
    fake_int8_rows,
    fake_ternary,
    int8_rows,
    pack_codes,
    packed_linear,
    packed_linear_reference,
    ternary,
    unpack_codes,
)

TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


def test_ternary_by_hand() -> None:
    codes, scale = ternary(torch.tensor([[0.9, -0.1], [0.3, -2.7]], dtype=torch.float64))
    assert scale.item() == 1.0  # the mean of the absolute values
    assert codes.tolist() == [[1.0, 0.0], [0.0, -1.0]]  # rounded, and cut off at 1


def test_each_matrix_of_a_batch_has_its_own_scale() -> None:
    weights = torch.randn(3, 5, 7, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    together = fake_ternary(weights)
    for one, weight in zip(together, weights, strict=True):
        assert torch.equal(one, fake_ternary(weight))
        assert one.unique().numel() == 3


def test_int8_rows_by_hand() -> None:
    codes, scale = int8_rows(torch.tensor([[254.0, -1.1, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    assert scale[0].item() == 2.0
    assert codes.tolist() == [[127.0, -1.0, 0.0], [0.0, 0.0, 0.0]]  # halves round to even


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_made_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32).to(dtype)
    codes, scale = int8_rows(x)
    assert codes.dtype == scale.dtype == torch.float32
    assert torch.equal(codes, int8_rows(x.float()).codes)
    assert fake_int8_rows(x).dtype == fake_ternary(x).dtype == dtype


@pytest.mark.parametrize("fake", [fake_ternary, fake_int8_rows])
def test_gradients_pass_straight_through(fake: type) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    direction = torch.randn(4, 6)
    (fake(x) * direction).sum().backward()
    assert torch.equal(x.grad, direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fake", [fake_ternary, fake_int8_rows])
def test_the_share_is_exact_at_both_ends_and_linear_between(fake: type, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    assert torch.equal(fake(x, torch.tensor(0.0)), x)
    assert torch.equal(fake(x, torch.tensor(1.0)), fake(x))
    quarter = x + 0.25 * (fake(x) - x)
    torch.testing.assert_close(fake(x, torch.tensor(0.25)), quarter)


@given(st.integers(1, 5), st.integers(1, 19), st.integers(0, 1000))
def test_packing_is_exact(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 4))
    assert torch.equal(unpack_codes(packed, columns), codes.to(torch.int8))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(1, 1, 13), (2, 3, 13), (40, 64), (3, 2), (5, 5)])
def test_product_of_whole_numbers_equals_that_of_floats(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(9, shape[-1]), torch.randn(9).to(dtype)
    codes, scale = ternary(weight)
    fast = packed_linear(x, pack_codes(codes), scale, bias)
    plain = packed_linear_reference(x, pack_codes(codes), scale, bias)
    assert fast.dtype == dtype
    assert fast.shape == (*shape[:-1], 9)
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())
    by_hand = torch.nn.functional.linear(fake_int8_rows(x), fake_ternary(weight).to(dtype), bias)
    assert torch.equal(plain, by_hand)
