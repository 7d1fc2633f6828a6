"""Dense: the map, its start, its role."""

from __future__ import annotations

import torch
from torch import nn

from graft.initialization import initialize
from graft.linears.dense import Dense
from graft.linears.dense_config import DenseConfig
from graft.part import parameter_roles


def dense(*, std: float = 0.02, bias: bool = True) -> Dense:
    module = DenseConfig().build(300, 200, bias=bias, role="attention", init_std=std)
    initialize(module, 0)
    return module


def test_is_a_linear_map() -> None:
    module = dense()
    assert isinstance(module, nn.Linear)
    with torch.no_grad():
        module.bias.normal_()
    x = torch.randn(2, 3, 300)
    torch.testing.assert_close(module(x), x @ module.weight.T + module.bias)


def test_start() -> None:
    module = dense(std=0.3)
    assert not module.bias.any()
    assert abs(module.weight.std().item() - 0.3) < 0.005
    assert abs(module.weight.mean().item()) < 0.005
    torch.testing.assert_close(module.weight / 3, dense(std=0.1).weight)  # the same draw at any spread


def test_roles() -> None:
    assert parameter_roles(dense()) == {"weight": "attention", "bias": "bias"}
    assert dense(bias=False).bias is None
