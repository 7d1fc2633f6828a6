"""HoPE: the boosts it stands for, and what they do to scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.config.model import ModelConfig
from graft.errors import ConfigError
from graft.model import build_model
from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.positions.base import AttentionPosition
from graft.positions.hope_config import HopeConfig

CPU = torch.device("cpu")


def scores(position: AttentionPosition, q_TH, k_TH, *, layer_idx=0, kernels="auto") -> torch.Tensor:
    """[T, T] scores in fp64: log-probabilities plus what a key of score 0 shows to be the row's constant."""
    T, H = q_TH.shape
    q, k = (position.encode(x.double().view(1, T, 1, H), ()) for x in (q_TH, k_TH))
    k = torch.cat((torch.zeros(1, 1, 1, H, dtype=torch.float64), k), dim=1)
    eye = torch.eye(T + 1, dtype=torch.float64).view(1, T + 1, 1, T + 1)
    rates = position.rates(layer_idx, CPU)
    p = attention(q, k, eye, Visibility(False, offset=1), Scoring(1.0, rates_H=rates), kernels=kernels)[0, :, 0]
    return p[:, 1:].log() - p[:, :1].log()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("H", [2, 4, 10])
def test_scores_are_damped_lorentz_boosts_in_channel_pairs(H, kernels):
    """qᵀ B(θ·r) k · e^(−θ'·r) summed over pairs, with cosh and sinh written out."""
    T, theta, damping = 7, 100.0, 0.03
    q, k = torch.randn(2, T, H, dtype=torch.float64)
    found = scores(HopeConfig(theta=theta, damping=damping).build(1, H), q, k, kernels=kernels)
    wanted = torch.zeros(T, T, dtype=torch.float64)
    for m in range(T):
        for n in range(T):
            for i in range(H // 2):
                boost = theta ** (-i / max(H // 2 - 1, 1))
                c, s = math.cosh(boost * abs(m - n)), math.sinh(boost * abs(m - n))
                matrix = torch.tensor([[c, -s], [-s, c]], dtype=torch.float64)
                pair = slice(2 * i, 2 * i + 2)
                wanted[m, n] += q[m, pair] @ matrix @ k[n, pair] * math.exp(-(boost + damping) * abs(m - n))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # rates are rounded to fp32


@given(shift=st.integers(0, 40))
def test_scores_depend_on_the_distance_alone(shift):
    position = HopeConfig().build(1, 8)
    q, k = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    tail = scores(position, torch.cat((torch.randn(shift, 8), q)), torch.cat((torch.randn(shift, 8), k)))
    torch.testing.assert_close(tail[shift:, shift:], scores(position, q, k), rtol=1e-9, atol=1e-9)


def test_score_falls_with_distance_where_products_are_positive():
    """Equal q and k everywhere: u² and v² are positive, so the score falls on both sides, in the end like e^(−c)."""
    T = 200
    x = torch.randn(1, 8).expand(T, 8)
    row = scores(HopeConfig().build(1, 8), x, x)[T // 2]
    assert (row[: T // 2].diff() > 0).all()
    assert (row[T // 2 + 1 :].diff() < 0).all()
    torch.testing.assert_close(row[:100].flip(0)[:99], row[101:])
    far = scores(HopeConfig(theta=2.0).build(1, 8), x, x)[0]  # every u channel has long faded
    assert (far[-1] / far[-2]).item() == pytest.approx(math.exp(-0.01), rel=1e-6)


def test_rates():
    position = HopeConfig(theta=100.0, damping=0.5, layer_scale=0.05).build(1, 6)
    wanted = torch.tensor([2.5, 0.7, 0.52, 0.5, 0.5, 0.5])
    torch.testing.assert_close(position.rates(0, CPU), wanted)
    torch.testing.assert_close(position.rates(4, CPU), wanted * 1.2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_finite_in_bf16_at_distances_of_thousands(causal, kernels):
    T = 4096 if kernels == "auto" else 300
    position = HopeConfig(layer_scale=1.0).build(1, 8)
    x = (8 * torch.randn(1, T, 1, 8)).bfloat16().requires_grad_()
    encoded = position.encode(x, ())
    assert encoded.dtype == torch.bfloat16
    rates = position.rates(30, CPU)
    out = attention(encoded, encoded, encoded, Visibility(causal), Scoring(1.0, rates_H=rates), kernels=kernels)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    assert torch.isfinite(out).all()
    assert torch.isfinite(gradient).all()
    assert gradient.any()


def test_encode_keeps_lengths_and_undoes_itself():
    position = HopeConfig().build(1, 6)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    u, v = position.encode(x, ()).chunk(2, dim=-1)
    again = torch.stack((u + v, u - v), dim=-1).flatten(-2) / math.sqrt(2)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(position.encode(x, ()).norm(dim=-1), x.norm(dim=-1))


def test_odd_heads_are_an_error():
    with pytest.raises(ConfigError, match="odd"):
        HopeConfig().build(2, 7)
    mixer = {"type": "attention", "num_heads": 2, "head_dim": 7, "position": {"type": "hope"}}
    model = {"hidden_size": 8, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": [mixer]}}
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        ModelConfig.model_validate(model)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_decoding_equals_the_full_forward_over_windows_and_layers(sliding_window):
    mixer = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "sliding_window": sliding_window}
    mixer["position"] = {"type": "hope", "layer_scale": 0.5}
    model = {"hidden_size": 16, "num_layers": 2, "loops": 2, "norm": {"type": "rms_norm"}, "blocks": {"b": [mixer]}}
    config = ModelConfig.model_validate(model)
    built = build_model(config, 11, seed=0, device="cpu", dtype=torch.float64).eval()
    ids = torch.randint(11, (2, 40))
    with torch.no_grad():
        full, state, pieces = built(ids), built.init_state(2, 40), []
        for chunk in ids.split([17, 1, 1, 9, 12], dim=1):
            logits, state = built.decode(chunk, state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-5, atol=1e-9)
