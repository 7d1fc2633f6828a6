"""RMSNorm: closed form, both conventions of the gain, precision."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graft.initialization import initialize
from graft.norms.rms_norm import RMSNorm
from graft.norms.rms_norm_config import RMSNormConfig
from graft.part import parameter_roles

SIZE, EPS = 24, 1e-3


def norm(*, unit_offset: bool = False) -> RMSNorm:
    module = RMSNorm(RMSNormConfig(eps=EPS, unit_offset=unit_offset), SIZE)
    initialize(module, 0)
    return module


@pytest.mark.parametrize("unit_offset", [False, True])
def test_starts_with_a_gain_of_one(unit_offset: bool) -> None:
    y = norm(unit_offset=unit_offset).double()(torch.full((2, SIZE), 3.0, dtype=torch.float64))
    torch.testing.assert_close(y, torch.full_like(y, 3.0 / math.sqrt(9.0 + EPS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("unit_offset", "oracle"), [(False, LlamaRMSNorm), (True, Gemma3RMSNorm)])
def test_equals_transformers_in_the_rounding_too(unit_offset: bool, oracle: type, dtype: torch.dtype) -> None:
    ours, theirs = norm(unit_offset=unit_offset), oracle(SIZE, EPS)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    x = (4 * torch.randn(64, SIZE)).to(dtype)
    y = ours.to(dtype)(x)
    assert y.dtype == dtype
    if dtype == torch.bfloat16:  # one rounding more or less would change some of the 1536 values
        assert torch.equal(y, theirs.to(dtype)(x))
    torch.testing.assert_close(y, theirs.to(dtype)(x))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_statistics_do_not_overflow_or_round_in_bf16(unit_offset: bool) -> None:
    module = norm(unit_offset=unit_offset)
    x = torch.randn(8, SIZE) * 300.0
    exact = module(x.to(torch.bfloat16).float())
    rounded = module(x.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients(unit_offset: bool) -> None:
    module = norm(unit_offset=unit_offset).double()
    x = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_role() -> None:
    assert parameter_roles(norm()) == {"weight": "norm"}
