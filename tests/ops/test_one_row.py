"""The linear map of a single row: the same numbers in the compiled form, which is used for one row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graft.ops.one_row import linear

CASES = [
    ((1, 1, 24), torch.bfloat16, False),
    ((24,), torch.bfloat16, False),
    ((1, 24), torch.float16, False),
    ((2, 1, 24), torch.bfloat16, True),
    ((1, 1, 24), torch.float32, True),
]
"""Shape, dtype, and whether the library's product is used."""


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "dtype", "by_library"), CASES)
def test_agrees_with_the_library(
    compiling: None, shape: tuple[int, ...], dtype: torch.dtype, by_library: bool, bias: bool
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(11, 24).to(dtype)
    added = torch.randn(11).to(dtype) if bias else None
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        found.append(any(node.target is F.linear for node in graph.graph.nodes))
        return graph

    with torch.no_grad():
        y = torch.compile(linear, backend=backend, fullgraph=True)(x, weight, added)
        assert found == [by_library]
        assert y.dtype == dtype
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(linear(x, weight, added), F.linear(x, weight, added))


def test_gradients_go_through_the_library(compiling: None) -> None:
    x, weight = torch.randn(1, 24).bfloat16(), torch.randn(11, 24).bfloat16().requires_grad_()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    expected = torch.autograd.grad(F.linear(x, weight).sum(), weight)
    assert torch.equal(torch.autograd.grad(compiled(x, weight, None).sum(), weight)[0], expected[0])
