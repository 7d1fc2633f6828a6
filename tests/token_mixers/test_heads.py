"""What positions do to scores reaches them, in every mixer that is attention over heads."""

from __future__ import annotations

import pytest
import torch

from graft.config.families import TokenMixerConfig
from graft.config.model import InitConfig
from graft.config.registry import variants
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.part import Context, Site
from graft.token_mixers.heads import MultiHead

LAYER = 3
POSITIONS = {"none": {}, "alibi": {}, "hope": {"layer_scale": 0.2, "damping": 0.05}}


def built(mixer: str, position: str, *, causal: bool) -> MultiHead:
    fields = {"num_heads": 4, "num_kv_heads": 2, "position": {"type": position, **POSITIONS[position]}}
    config = variants("token_mixer")[mixer].model_validate(fields)
    assert isinstance(config, TokenMixerConfig)
    part = config.build(Site(24, LAYER, 5, 9, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3)))
    assert isinstance(part, MultiHead)
    initialize(part, seed=1)
    return part.double()


@pytest.mark.parametrize("mixer", ["attention", "sigmoid_attention"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_positions_reach_the_scores(mixer, position, causal, kernels):
    """Scores from slopes and rates written out for every pair, then the mixer's own way of weighing."""
    T = 21
    part = built(mixer, position, causal=causal)
    part.kernels = kernels
    x = torch.randn(1, T, 24, dtype=torch.float64)
    ctx = Context(torch.zeros(1, T, dtype=torch.int64), torch.arange(T)[None], None, causal)
    found = part(x, ctx).y[0]

    q, k, v = (y[0] for y in part.project(x, ctx))
    away = (torch.arange(T)[:, None] - torch.arange(T)).abs().double()
    hidden = away.new_ones(T, T, dtype=torch.bool).triu(1) if causal else away.new_zeros(T, T, dtype=torch.bool)
    slopes, rates = torch.zeros(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    if position == "alibi":
        slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    if position == "hope":
        boosts = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
        rates = (1 + 0.2 * LAYER) * torch.cat((2 * boosts + 0.05, torch.full((3,), 0.05, dtype=torch.float64)))
    heads = []
    for n in range(4):
        products = q[:, None, n] * k[None, :, n // 2] * torch.exp(-rates * away[..., None])
        scores = products.sum(-1) / 6**0.5 - slopes[n] * away
        if mixer == "attention":
            p = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        else:
            count = (~hidden).sum(-1, keepdim=True)
            p = torch.sigmoid(scores - count.log()).masked_fill(hidden, 0.0)
        heads.append(p @ v[:, n // 2])
    wanted = part.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # rates and slopes are fp32
