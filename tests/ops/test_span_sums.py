"""Sums of spans: running sums against adding up, in closed form, and where digits are at stake."""

from __future__ import annotations

import pytest
import torch

from graft.ops.span_sums import span_sums


def test_values_and_gradients() -> None:
    x = torch.randn(3, 11, 4, dtype=torch.float64, requires_grad=True)
    first = torch.randint(0, 12, (3, 7))
    last = torch.maximum(first, torch.randint(0, 12, (3, 7)))
    expected = torch.stack([torch.stack([x[b, i:j].sum(0) for i, j in zip(first[b], last[b])]) for b in range(3)])  # noqa: B905
    upstream = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, upstream, retain_graph=True)
    for kernels in ("auto", "reference"):
        y = span_sums(x, first, last, kernels=kernels)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(y, x, upstream)
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_an_empty_span_is_zero() -> None:
    x, at = torch.randn(1, 5, 2), torch.tensor([[0, 3, 5]])
    for kernels in ("auto", "reference"):
        assert not span_sums(x, at, at, kernels=kernels).any()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_short_spans_late_in_a_long_row_keep_their_digits(kernels: str) -> None:
    x = torch.rand(1, 20_000, 1) + 1000
    last = torch.tensor([[20_000]])
    y = span_sums(x, last - 1, last, kernels=kernels)
    torch.testing.assert_close(y[0, 0], x[0, -1], rtol=1e-7, atol=0)
