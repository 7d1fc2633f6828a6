"""LayerNorm: closed form, precision, roles."""

from __future__ import annotations

import pytest
import torch

from graft.initialization import initialize
from graft.norms.layer_norm import LayerNorm
from graft.norms.layer_norm_config import LayerNormConfig
from graft.part import parameter_roles

SIZE = 20


def norm(*, bias: bool = True) -> LayerNorm:
    module = LayerNorm(LayerNormConfig(eps=1e-2, bias=bias), SIZE)
    initialize(module, 0)
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_closed_form(bias: bool) -> None:
    module = norm(bias=bias).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x = torch.randn(5, SIZE, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-2) * module.weight
    torch.testing.assert_close(module(x), expected + module.bias if module.bias is not None else expected)


def test_starts_without_gain_or_shift() -> None:
    x = torch.randn(7, SIZE) * 5 + 3
    y, variance = norm()(x), x.var(-1, unbiased=False)
    torch.testing.assert_close(y.mean(-1), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(-1, unbiased=False), variance / (variance + 1e-2), atol=1e-5, rtol=0)


def test_statistics_in_fp32() -> None:
    module = norm()
    x = (torch.randn(6, SIZE) + 200).to(torch.bfloat16)  # bf16 statistics would lose the spread altogether
    assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x), module(x.float()).to(torch.bfloat16), rtol=0, atol=0)


def test_same_dtype_out_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm()(torch.randn(2, SIZE)).dtype == torch.float32
        assert norm()(torch.randn(2, SIZE).to(torch.bfloat16)).dtype == torch.bfloat16


def test_roles() -> None:
    assert parameter_roles(norm()) == {"weight": "norm", "bias": "bias"}
    assert parameter_roles(norm(bias=False)) == {"weight": "norm"}
