"""A tiny model that owns a parameter of every kind the optimizers must tell apart."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from graft.config.roles import Role


class Owner(nn.Module):
    """Holds tensors of one role."""

    def __init__(self, role: Role, param_roles: Mapping[str, Role] | None = None, **shapes: tuple[int, ...]):
        super().__init__()
        self.role = role
        self.param_roles = param_roles or {}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class TinyModel(nn.Module):
    """Every role of interest, some of them matrices that must not be orthogonalised."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = Owner("embedding", weight=(11, 6))
        self.attention = Owner("attention", {"gain": "scalar"}, q=(8, 6), o=(6, 8), bias=(6,), gain=(1,))
        self.mlp = Owner("mlp", up=(16, 6), up2=(16, 6), down=(6, 16), row=(1, 6))
        self.experts = Owner("expert", w=(3, 6, 4))
        self.conv = Owner("conv", kernel=(6, 1, 4))
        self.router = Owner("router", weight=(4, 6))
        self.bank = Owner("memory_bank", slots=(5, 6))
        self.norm = Owner("norm", weight=(6,))
        self.head = Owner("head", weight=(11, 6))
        if tied:
            self.head.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def fill_gradients(self, step: int) -> None:
        """Gradients that depend on the step and the parameter's name alone."""
        for i, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def values(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}


@pytest.fixture
def tiny_model() -> Callable[..., TinyModel]:
    """Makes the tiny model: equal numbers every time."""

    def make(tied: bool = False) -> TinyModel:
        return TinyModel(tied)

    return make
