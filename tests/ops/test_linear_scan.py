"""The linear scan: both forms, values and gradients, forgetting, and a closed form."""

from __future__ import annotations

import pytest
import torch

from graft.ops.linear_scan import CHUNK, linear_scan

LENGTHS = [1, 2, CHUNK, CHUNK + 1, 3 * CHUNK, CHUNK * CHUNK + 5]


def inputs(T, dtype=torch.float64):
    decay = torch.rand(2, T, 3, dtype=dtype)
    decay[0, T // 2] = 0.0
    return decay, torch.randn(2, T, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("begins", [False, True])
def test_both_forms_agree_in_values_and_gradients(T, begins):
    tensors = [x.requires_grad_() for x in inputs(T)[: 2 if begins else 3]]
    direction, results = torch.randn(2, T, 3, dtype=torch.float64), []
    for kernels in ("auto", "reference"):
        h = linear_scan(*tensors, kernels=kernels)
        results.append((h, *torch.autograd.grad((h * direction).sum(), tensors)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_in_fp32_too():
    tensors = inputs(100, torch.float32)
    wide = linear_scan(*(x.double() for x in tensors), kernels="reference")
    torch.testing.assert_close(linear_scan(*tensors), wide.float(), rtol=1e-5, atol=1e-6)


def test_gradients_are_right():
    tensors = tuple(x.requires_grad_() for x in inputs(CHUNK + 3))
    assert torch.autograd.gradcheck(linear_scan, tensors)


def test_a_constant_decay_gives_a_geometric_series():
    T, a = 70, 0.9
    ones = torch.ones(1, T, 1, dtype=torch.float64)
    h = linear_scan(a * ones, ones)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    torch.testing.assert_close(h[0, :, 0], (1 - a**t) / (1 - a))


def test_strong_decays_stay_exact():
    """Products underflow to zero within a chunk; a form that divides by them would give NaN."""
    decay = torch.full((1, 64, 2), 1e-30)
    x = torch.randn(1, 64, 2)
    h = linear_scan(decay, x, torch.ones(1, 2))
    torch.testing.assert_close(h, x)


def test_it_continues():
    decay, x, state = inputs(50)
    whole = linear_scan(decay, x, state)
    first = linear_scan(decay[:, :23], x[:, :23], state)
    second = linear_scan(decay[:, 23:], x[:, 23:], first[:, -1])
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
