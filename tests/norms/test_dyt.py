"""Dynamic Tanh: closed form, oracle, roles."""

from __future__ import annotations

import torch
from norm_oracles import DynamicTanh

from graft.config.roles import NO_DECAY
from graft.initialization import initialize
from graft.norms.dyt import DyT
from graft.norms.dyt_config import DyTConfig
from graft.part import parameter_roles

SIZE = 12


def norm(alpha: float = 0.5) -> DyT:
    module = DyT(DyTConfig(alpha_init=alpha), SIZE)
    initialize(module, 0)
    return module


def test_start() -> None:
    x = torch.linspace(-3, 3, SIZE)
    torch.testing.assert_close(norm(0.8)(x), torch.tanh(0.8 * x))


def test_equals_the_oracle_with_gradients() -> None:
    ours, theirs = norm().double(), DynamicTanh(SIZE).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        theirs.pre_tanh_scale.copy_(ours.alpha)
        theirs.gamma.copy_(ours.weight)
        theirs.beta.copy_(ours.bias)
    x = torch.randn(4, SIZE, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    torch.testing.assert_close(ours(x), theirs(x))
    mine = torch.autograd.grad((ours(x) * direction).sum(), (x, ours.alpha, ours.weight, ours.bias))
    other = torch.autograd.grad((theirs(x) * direction).sum(), (x, theirs.pre_tanh_scale, theirs.gamma, theirs.beta))
    torch.testing.assert_close(mine, other)


def test_bounded_and_without_statistics() -> None:
    x = torch.randn(3, SIZE) * 1e4
    y = norm()(x)
    assert y.abs().max() <= 1.0
    torch.testing.assert_close(y[:1], norm()(x[:1]), rtol=0, atol=0)


def test_roles_never_decay() -> None:
    roles = parameter_roles(norm())
    assert roles == {"alpha": "scalar", "weight": "norm", "bias": "bias"}
    assert set(roles.values()) <= NO_DECAY
