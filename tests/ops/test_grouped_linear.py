"""A linear map per expert: the fast forms against the loop, in values and gradients, whoever has how many rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.grouped_linear import _takes, grouped_linear, reference_grouped_linear

ROWS = {"uneven": [3, 1, 5, 2], "empty ones": [0, 4, 0, 0, 7, 0], "all in one": [0, 0, 9], "one row": [0, 1, 0]}
SIZES = [(16, 24), (5, 7)]
"""The first is taken by PyTorch's grouped product in fp32 and below, the second is not aligned."""


def case(rows: list[int], sizes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    x = torch.randn(sum(rows), sizes[0], dtype=dtype, requires_grad=True)
    weight = torch.randn(len(rows), sizes[1], sizes[0], dtype=dtype, requires_grad=True)
    return x, weight, ends, torch.randn(sum(rows), sizes[1], dtype=dtype)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("sizes", SIZES, ids=["aligned", "odd"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=str
)
def test_equals_the_loop(rows: list[int], sizes: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    x, weight, ends, direction = case(rows, sizes, dtype)
    y = grouped_linear(x, weight, ends)
    expected = reference_grouped_linear(x.double(), weight.double(), ends)
    fast = torch.autograd.grad(y, (x, weight), direction)
    plain = torch.autograd.grad(expected, (x, weight), direction.double())
    assert y.dtype == dtype
    for actual, wanted in zip((y, *fast), (expected, *plain), strict=True):
        assert (actual.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_closed_form() -> None:
    x, weight, ends, _ = case([2, 0, 1], (3, 4), torch.float64)
    expected = torch.stack([weight[0] @ x[0], weight[0] @ x[1], weight[2] @ x[2]])
    for kernels in ("auto", "reference"):
        torch.testing.assert_close(grouped_linear(x, weight, ends, kernels=kernels), expected)


def test_experts_without_rows_get_a_gradient_of_zero() -> None:
    for sizes in SIZES:
        x, weight, ends, direction = case([0, 4, 0], sizes, torch.float32)
        (d_weight,) = torch.autograd.grad(grouped_linear(x, weight, ends), weight, direction)
        assert d_weight[1].any()
        assert not d_weight[0].any()
        assert not d_weight[2].any()


def test_both_fast_forms_are_tried_here() -> None:
    """PyTorch's grouped product is what aligned fp32 goes through, and the padded one what it does not take."""
    taken, odd = torch.zeros(3, 16), torch.zeros(3, 5)
    assert _takes(taken)
    assert not _takes(odd)
    assert not _takes(taken.double())
    assert not _takes(torch.zeros(49)[1:].view(3, 16))  # rows that start off the grid


@pytest.mark.parametrize("sizes", SIZES, ids=["aligned", "odd"])
def test_without_the_grouped_product(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of PyTorch that lack it get the padded form."""
    monkeypatch.delattr(F, "grouped_mm")
    x, weight, ends, direction = case([3, 0, 5], sizes, torch.float32)
    y, expected = grouped_linear(x, weight, ends), reference_grouped_linear(x, weight, ends)
    torch.testing.assert_close(y, expected)
    for actual, wanted in zip(
        torch.autograd.grad(y, (x, weight), direction),
        torch.autograd.grad(expected, (x, weight), direction),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_gradients_need_not_be_contiguous() -> None:
    x, weight, ends, _ = case([3, 0, 5], (16, 24), torch.float32)
    (d_x,) = torch.autograd.grad(grouped_linear(x, weight, ends).sum(), x)
    torch.testing.assert_close(d_x, torch.cat([weight[0].sum(0).expand(3, -1), weight[2].sum(0).expand(5, -1)]))


def test_autocast_decides_the_dtype() -> None:
    x, weight, ends, direction = case([3, 0, 5], (16, 24), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weight, ends)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, grouped_linear(x.bfloat16(), weight.bfloat16(), ends))
    assert torch.autograd.grad(y, weight, direction.bfloat16())[0].dtype == torch.float32
