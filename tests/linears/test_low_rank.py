"""Low-rank maps: the product of two matrices, its start, its gradients and its price."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.initialization import initialize
from graft.linears.low_rank import LowRank
from graft.linears.low_rank_config import LowRankConfig
from graft.optimizers.groups import named_trainable
from graft.optimizers.muon import takes_muon
from graft.part import linear_flops, parameter_roles

TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]


def low_rank(rank: int = 6, *, std: float = 0.02, size: tuple[int, int] = (40, 30), bias: bool = True) -> LowRank:
    module = LowRankConfig(rank=rank).build(*size, bias=bias, role="attention", init_std=std)
    initialize(module, 0)
    return module


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_is_the_dense_map_of_the_product(dtype: torch.dtype, tolerance: float) -> None:
    module = low_rank(std=1.0).to(dtype)
    with torch.no_grad():
        module.up.bias.normal_()
    x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    up, down = (m.weight.detach().double() for m in (module.up, module.down))
    product = (up @ down).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = module(x), wide @ product.T + module.up.bias.double()
    direction = torch.randn(2, 3, 30, dtype=torch.float64)
    (y * direction.to(dtype)).sum().backward()
    (expected * direction).sum().backward()
    assert product.grad is not None
    pairs = [
        (y, expected),
        (x.grad, wide.grad),
        (module.up.weight.grad, product.grad @ down.T),
        (module.down.weight.grad, up.T @ product.grad),
    ]
    for actual, wanted in pairs:
        assert actual is not None
        assert wanted is not None
        torch.testing.assert_close(
            actual.double(), wanted.double(), rtol=tolerance, atol=tolerance * wanted.abs().max().item()
        )


@pytest.mark.parametrize("rank", [1, 16, 200])
def test_the_product_starts_as_spread_as_a_dense_matrix(rank: int) -> None:
    module = low_rank(rank, std=0.05, size=(600, 500))
    product = module.up.weight @ module.down.weight
    assert abs(product.std().item() / 0.05 - 1) < 0.1
    assert abs(module.up.weight.std() / module.down.weight.std() - 1) < 0.15


def test_a_map_that_starts_at_zero_can_learn() -> None:
    module, x = low_rank(std=0.0), torch.randn(5, 40)
    y = module(x)
    assert not y.any()
    y.sum().backward()
    assert module.up.weight.grad is not None
    assert module.up.weight.grad.all()
    assert abs(module.down(x).std().item() - 1) < 0.3


def test_roles_and_price() -> None:
    module = low_rank()
    roles = {"down.weight": "attention", "up.weight": "attention", "up.bias": "bias"}
    assert parameter_roles(module) == roles
    assert sum(p.numel() for p in module.parameters()) == 6 * (40 + 30) + 30
    with FlopCounterMode(display=False) as counter:
        low_rank(bias=False)(torch.randn(1, 40))
    assert linear_flops(module) == counter.get_total_flops() == 2 * 6 * (40 + 30)
    assert {item.name for item in named_trainable(module) if takes_muon(item)} == {"down.weight", "up.weight"}
