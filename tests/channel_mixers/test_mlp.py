"""The feed-forward network: closed form, cost, start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from graft.channel_mixers.mlp import Mlp
from graft.channel_mixers.mlp_config import MlpConfig
from graft.config.model import InitConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.part import Context, Site, parameter_roles

D, FF = 10, 14
CTX = Context(torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, 3))


def mlp(init: InitConfig | None = None, **fields: Any) -> Mlp:
    site = Site(D, 0, 4, 8, True, RMSNormConfig(), DenseConfig(), init or InitConfig())
    part = MlpConfig(intermediate_size=FF, **fields).build(site)
    initialize(part, 0)
    return part


@pytest.mark.parametrize("bias", [False, True])
def test_closed_forms(bias: bool) -> None:
    x = torch.randn(2, 3, D)
    gated = mlp(bias=bias, activation="gelu_tanh")
    inner = F.gelu(gated.gate_proj(x), approximate="tanh") * gated.up_proj(x)
    torch.testing.assert_close(gated(x, CTX).y, gated.down_proj(inner))
    plain = mlp(bias=bias, gated=False, activation="relu2")
    torch.testing.assert_close(plain(x, CTX).y, plain.down_proj(plain.up_proj(x).clamp(min=0) ** 2))
    for module in gated, plain:
        assert any("bias" in name for name, _ in module.named_parameters()) == bias


@pytest.mark.parametrize("gated", [False, True])
def test_counted_flops_and_parameters(gated: bool) -> None:
    part, matrices = mlp(gated=gated), 3 if gated else 2
    with FlopCounterMode(display=False) as counter:
        part(torch.randn(2, 3, D), CTX)
    assert part.flops_per_token(3) * 6 == counter.get_total_flops() == 6 * 2 * matrices * D * FF
    assert part.active_parameters() == matrices * D * FF


def test_dropout_acts_in_training_only() -> None:
    part, x = mlp(dropout=0.5), torch.randn(2, 3, D)
    assert not torch.equal(part(x, CTX).y, part(x, CTX).y)
    part.eval()
    assert torch.equal(part(x, CTX).y, mlp()(x, CTX).y)


def test_depth_scaled_start_of_the_output_alone() -> None:
    plain, scaled = mlp(), mlp(InitConfig(residual="depth"))
    torch.testing.assert_close(scaled.down_proj.weight, plain.down_proj.weight / 8**0.5)  # 8 branches
    assert torch.equal(scaled.up_proj.weight, plain.up_proj.weight)
    assert torch.equal(scaled.gate_proj.weight, plain.gate_proj.weight)


def test_roles() -> None:
    assert set(parameter_roles(mlp(bias=True)).values()) == {"mlp", "bias"}
