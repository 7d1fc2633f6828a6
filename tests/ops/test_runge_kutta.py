"""Runge-Kutta methods against closed forms, their orders of convergence, and torchdiffeq."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import rk4_step_func
from torchdiffeq._impl.solvers import FixedGridODESolver

from graft.ops.runge_kutta import TABLEAUS, increment


class ClassicRK4(FixedGridODESolver):
    """torchdiffeq's own choice is the 3/8 rule; it has the classic step too."""

    order = 4

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        return rk4_step_func(func, t0, dt, t1, y0), func(t0, y0)


ORACLES = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "classic_rk4"}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def test_every_method_has_an_oracle() -> None:
    assert TABLEAUS.keys() == ORACLES.keys() == ORDERS.keys()


def matrix() -> Tensor:
    return torch.randn(5, 5, dtype=torch.float64) / 2


@pytest.mark.parametrize("name", TABLEAUS)
def test_a_linear_field_gives_the_series_of_the_exponential(name: str) -> None:
    """One step of a method of order p with p stages: Σ A^i / i! up to i = p."""
    A, z = matrix(), torch.randn(3, 5, dtype=torch.float64)
    moved = increment(lambda z, t, i: z @ A.T, z, TABLEAUS[name], 1)
    terms = [z @ torch.linalg.matrix_power(A, i).T / math.factorial(i) for i in range(1, ORDERS[name] + 1)]
    torch.testing.assert_close(moved, sum(terms[1:], start=terms[0]))


@pytest.mark.parametrize("name", TABLEAUS)
def test_order_of_convergence(name: str) -> None:
    A, z = matrix(), torch.randn(3, 5, dtype=torch.float64)
    exact = z @ torch.linalg.matrix_exp(A).T - z
    errors = [(increment(lambda z, t, i: z @ A.T, z, TABLEAUS[name], n) - exact).abs().max() for n in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", TABLEAUS)
def test_torchdiffeq_gives_the_same_values_and_gradients(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that is neither linear nor free of time."""
    monkeypatch.setitem(SOLVERS, "classic_rk4", ClassicRK4)
    A, z = matrix().requires_grad_(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def field(t: Tensor | float, z: Tensor) -> Tensor:
        return torch.tanh(z @ A.T + 2 * t) * (1 + t * t)

    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    options = {"grid_constructor": lambda *_: grid}
    wanted = odeint(field, z, grid[[0, -1]], method=ORACLES[name], options=options)[-1] - z
    moved = increment(lambda z, t, i: field(t, z), z, TABLEAUS[name], steps)
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-13)
    direction = torch.randn_like(z)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * direction).sum(), (z, A)) for y in (moved, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_times_and_numbers_of_evaluations() -> None:
    seen: list[tuple[float, int]] = []
    increment(lambda z, t, i: seen.append((t, i)) or z, torch.ones(1), TABLEAUS["rk4"], 2)
    assert seen == [(0.0, 0), (0.25, 1), (0.25, 2), (0.5, 3), (0.5, 4), (0.75, 5), (0.75, 6), (1.0, 7)]


def test_weights_take_the_place_of_the_methods_own() -> None:
    z, weights = torch.randn(4, dtype=torch.float64), torch.tensor([0.2, 0.7], requires_grad=True)
    own = torch.tensor(TABLEAUS["heun"].weights)
    plain = increment(lambda z, t, i: z.sin(), z, TABLEAUS["heun"], 3)
    torch.testing.assert_close(increment(lambda z, t, i: z.sin(), z, TABLEAUS["heun"], 3, own), plain)
    moved = increment(lambda z, t, i: z.sin(), z, TABLEAUS["heun"], 1, weights)
    wanted = weights[0] * z.sin() + weights[1] * (z + z.sin()).sin()
    torch.testing.assert_close(moved, wanted)
    moved.sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([z.sin().sum(), (z + z.sin()).sin().sum()]).float())


def test_many_small_steps_survive_bf16() -> None:
    """The sum is kept in fp32: in bf16 steps of 1/1000 would be lost beside it."""
    z = torch.zeros(1, dtype=torch.bfloat16)
    moved = increment(lambda z, t, i: torch.ones_like(z), z, TABLEAUS["euler"], 1000)
    assert moved.dtype == torch.bfloat16
    assert moved.item() == 1
