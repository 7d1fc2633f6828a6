"""Our gated linear attention is flash-linear-attention's layer, with its plain form of the recurrence, in fp64.

Their g_proj is our gate_proj, the two maps of gk_proj are decay_down_proj and decay_up_proj, g_norm is head_norm, and
the logits' normaliser is our gate_temperature.
"""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import nn
from weights import assert_close

from graft.config.model import ModelConfig
from graft.model import build_model
from graft.part import Context, Part

B, T, D, N, RANK = 2, 19, 12, 3, 5
NAMES = {"g_proj": "gate_proj", "gk_proj.0": "decay_down_proj", "gk_proj.1": "decay_up_proj", "g_norm": "head_norm"}


def our_name(name: str) -> str:
    module, parameter = name.rsplit(".", 1)
    return f"{NAMES.get(module, module)}.{parameter}"


def our_layer(kernels: Any) -> Part:
    """With random weights."""
    mixer = {"type": "gla", "num_heads": N, "gate_low_rank_dim": RANK, "gate_temperature": 4.0}
    norm = {"type": "rms_norm", "eps": 1e-2}
    config = {"hidden_size": D, "num_layers": 1, "norm": norm, "blocks": {"decoder": [mixer]}}
    model = build_model(ModelConfig.model_validate(config), 7, seed=0, dtype=torch.float64)
    model.set_runtime(kernels=kernels)
    part = model.get_submodule("layers.0.gla.part")
    assert isinstance(part, Part)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.7)
    return part


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_values_and_gradients(kernels: str) -> None:
    ours = our_layer(kernels)
    theirs = oracles.fla_gla()(
        hidden_size=D,
        num_heads=N,
        gate_low_rank_dim=RANK,
        gate_logit_normalizer=4,
        norm_eps=1e-2,
        fuse_norm=False,
    ).double()
    theirs.load_state_dict({name: ours.get_parameter(our_name(name)) for name in theirs.state_dict()})
    assert len(theirs.state_dict()) == len(ours.state_dict())
    xs = [torch.randn(B, T, D, dtype=torch.float64).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    ctx = Context(torch.zeros(B, T, dtype=torch.int64), torch.arange(T).expand(B, T))
    actual, (expected, *_) = ours(xs[0], ctx).y, theirs(xs[1])
    assert_close(actual, expected, "output", 1e-12)
    direction = torch.randn_like(actual)
    actual.backward(direction)
    expected.backward(direction)
    assert_close(xs[0].grad, xs[1].grad, "gradient of x", 1e-12)
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(our_name(name)).grad, parameter.grad, f"gradient of {name}", 1e-12)
