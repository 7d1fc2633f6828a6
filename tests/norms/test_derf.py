"""Derf: closed form, oracle, roles."""

from __future__ import annotations

import math

import torch
from norm_oracles import Derf as OtherDerf

from graft.config.roles import NO_DECAY
from graft.initialization import initialize
from graft.norms.derf import Derf
from graft.norms.derf_config import DerfConfig
from graft.part import parameter_roles

SIZE = 12


def norm(alpha: float = 0.5, shift: float = 0.0) -> Derf:
    module = Derf(DerfConfig(alpha_init=alpha, shift_init=shift), SIZE)
    initialize(module, 0)
    return module


def test_start() -> None:
    y = norm(0.7, 0.2)(torch.full((SIZE,), 1.5))
    torch.testing.assert_close(y, torch.full((SIZE,), math.erf(0.7 * 1.5 + 0.2)))


def test_equals_the_oracle_with_gradients() -> None:
    ours, theirs = norm().double(), OtherDerf(SIZE).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        theirs.alpha.copy_(ours.alpha)
        theirs.s.copy_(ours.shift)
        theirs.gamma.copy_(ours.weight)
        theirs.beta.copy_(ours.bias)
    x = torch.randn(4, SIZE, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    torch.testing.assert_close(ours(x), theirs(x))
    own = (x, ours.alpha, ours.shift, ours.weight, ours.bias)
    other = (x, theirs.alpha, theirs.s, theirs.gamma, theirs.beta)
    mine = torch.autograd.grad((ours(x) * direction).sum(), own)
    torch.testing.assert_close(mine, torch.autograd.grad((theirs(x) * direction).sum(), other))


def test_bf16_is_rounded_once() -> None:
    x = torch.randn(50, SIZE).to(torch.bfloat16)
    torch.testing.assert_close(norm()(x), norm()(x.float()).to(torch.bfloat16), rtol=0, atol=0)


def test_roles_never_decay() -> None:
    roles = parameter_roles(norm())
    assert roles == {"alpha": "scalar", "shift": "scalar", "weight": "norm", "bias": "bias"}
    assert set(roles.values()) <= NO_DECAY
