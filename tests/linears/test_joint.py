"""Several linear maps of one input: the same numbers as each by itself, in one product when compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.linears.dense import Dense
from graft.linears.dense_config import DenseConfig
from graft.linears.joint import joint_linear

SIZES = (5, 3, 7)


class Doubled(Dense):
    """A map of another kind."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def maps(*, bias: bool, kind: type[Dense] = Dense) -> nn.ModuleList:
    made = [kind(DenseConfig(), 4, size, bias=bias, role="mlp", init_std=0.1) for size in SIZES]
    for m in made:
        nn.init.normal_(m.weight)
    return nn.ModuleList(made)


def gradients(outs: tuple[Tensor, ...], x: Tensor, linears: nn.ModuleList) -> tuple[Tensor, ...]:
    loss = sum((out * (i + 1)).square().sum() for i, out in enumerate(outs))
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, [x, *linears.parameters()])


@pytest.mark.parametrize("bias", [False, True])
def test_not_compiled_each_map_is_called(bias: bool) -> None:
    linears, x = maps(bias=bias), torch.randn(2, 6, 4)
    for out, linear in zip(joint_linear(x, list(linears)), linears, strict=True):
        assert torch.equal(out, linear(x))


@pytest.mark.parametrize(("bias", "kind", "products"), [(False, Dense, 1), (True, Dense, 1), (False, Doubled, 3)])
def test_compiled_plain_maps_are_one_product(compiling: None, bias: bool, kind: type[Dense], products: int) -> None:
    linears, x = maps(bias=bias, kind=kind), torch.randn(2, 6, 4, requires_grad=True)
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        found.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda y: joint_linear(y, list(linears)), backend=backend, fullgraph=True)
    outs, expected = compiled(x), tuple(linear(x) for linear in linears)
    assert found == [products]
    assert [out.shape for out in outs] == [(2, 6, size) for size in SIZES]
    torch.testing.assert_close(outs, expected)
    torch.testing.assert_close(gradients(outs, x, linears), gradients(expected, x, linears))


def test_a_mix_with_and_without_bias_is_not_joined(compiling: None) -> None:
    linears, x = nn.ModuleList([*maps(bias=True), *maps(bias=False)]), torch.randn(3, 4)
    compiled = torch.compile(lambda y: joint_linear(y, list(linears)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), tuple(linear(x) for linear in linears))


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_matrices_are_rounded_before_they_are_put_together(compiling: None, bias: bool) -> None:
    linears, x = maps(bias=bias), torch.randn(2, 6, 4, requires_grad=True)
    joined: list[torch.dtype] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        joined.extend(n.meta["example_value"].dtype for n in graph.graph.nodes if n.target is torch.cat)
        return graph

    compiled = torch.compile(lambda y: joint_linear(y, list(linears)), backend=backend, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs, expected = compiled(x), tuple(linear(x) for linear in linears)
    assert joined == [torch.bfloat16] * (1 + bias)
    torch.testing.assert_close(outs, expected)
    for found, wanted in zip(gradients(outs, x, linears), gradients(expected, x, linears), strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()  # one rounded sum instead of three
