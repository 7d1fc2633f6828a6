"""Activations against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from graft.ops.activations import ACTIVATIONS, soft_cap

DEFINITIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_definition(name: str) -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    expected = torch.tensor([DEFINITIONS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected)


def test_soft_cap() -> None:
    x = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6], dtype=torch.float64)
    y = soft_cap(x, 30.0)
    assert y.abs().max() <= 30.0
    torch.testing.assert_close(y[1:4], x[1:4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gelu_tanh_compiled(dtype: torch.dtype, compiling: None) -> None:
    """The compiled form, which uses no tanh, gives the same numbers and gradients, at the ends too."""
    x = torch.tensor([-1e4, -30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 30.0, 1e4], dtype=dtype)

    def value_and_gradient(function) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return y, torch.autograd.grad(y.sum(), leaf)[0]

    compiled = torch.compile(lambda leaf: ACTIVATIONS["gelu_tanh"](leaf), dynamic=False)
    for actual, expected in zip(
        value_and_gradient(compiled), value_and_gradient(ACTIVATIONS["gelu_tanh"]), strict=True
    ):
        torch.testing.assert_close(actual, expected)
