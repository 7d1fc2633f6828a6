"""xPos against the paper's two-sided form, and where that form fails."""

from __future__ import annotations

import pytest
import torch

from graft.config.model import ModelConfig
from graft.errors import ConfigError
from graft.model import build_model
from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.kernels import Kernels
from graft.positions.rope_config import RopeConfig
from graft.positions.xpos import Xpos
from graft.positions.xpos_config import XposConfig

CPU = torch.device("cpu")


def xpos(head_dim: int = 8, **fields) -> Xpos:
    return XposConfig(**fields).build(1, head_dim)


def two_sided(q_TH, k_TH, *, theta, scale_base, smoothing) -> torch.Tensor:
    """The paper's algorithm in fp64: scores [T, T] of (q ⊙ cos + turned q ⊙ sin) ζ^n and (k …) ζ^−n."""
    T, H = q_TH.shape
    pairs, n = torch.arange(0, H, 2, dtype=torch.float64), torch.arange(T, dtype=torch.float64)[:, None]
    zeta = ((pairs / H + smoothing) / (1 + smoothing)) ** (n / scale_base)
    angles = n * theta ** (-pairs / H)
    q, k = (
        torch.complex(x[:, : H // 2], x[:, H // 2 :]) * torch.polar(torch.ones_like(zeta), angles) for x in (q_TH, k_TH)
    )
    return ((q * zeta) @ (k / zeta).mH).real


def attended(
    position: Xpos, q_TH, k_TH, v_TH, positions_T, *, causal: bool = True, kernels: Kernels = "auto"
) -> torch.Tensor:
    q, k, v = (x[None, :, None] for x in (q_TH, k_TH, v_TH))
    tables = position.tables(positions_T[None])
    q, k, rates = position.encode(q, tables), position.encode(k, tables), position.rates(0, CPU)
    return attention(q, k, v, Visibility(causal), Scoring(0.7, rates_H=rates), kernels=kernels)[0, :, 0]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("fields", [{}, {"theta": 100.0, "scale_base": 5.0, "smoothing": 0.1}])
def test_it_is_the_two_sided_form_of_the_paper(fields, kernels):
    q, k, v = torch.randn(3, 40, 8, dtype=torch.float64)
    defaults = {"theta": 10_000.0, "scale_base": 512.0, "smoothing": 0.4}
    scores = two_sided(q, k, **{**defaults, **fields}) * 0.7
    wanted = scores.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v
    found = attended(xpos(**fields), q, k, v, torch.arange(40), kernels=kernels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # angles and rates are fp32


def test_the_factors_of_a_pair_are_those_of_the_paper():
    """H = 4, smoothing 0.4: ζ = 0.4/1.4 and 0.9/1.4, reached after scale_base positions."""
    factors = (-xpos(4, scale_base=10.0).rates(3, CPU) * 10).exp()
    torch.testing.assert_close(factors, torch.tensor([0.4, 0.9, 0.4, 0.9]) / 1.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_as_good_as_near_ones(dtype):
    """At 100000 the paper's factors for q and k are beyond fp32; only differences count here."""
    assert torch.tensor(1 / (0.4 / 1.4)) ** (100_000 / 512) == torch.inf
    q, k, v = torch.randn(3, 12, 8)
    near, far = (
        attended(xpos(theta=2.0**16), q.to(dtype), k.to(dtype), v.to(dtype), torch.arange(12) + start)
        for start in (0, 100_000)
    )
    assert far.isfinite().all()
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.02  # fp32 angles at 100000 are exact to 0.004
    torch.testing.assert_close(far, near, rtol=tolerance, atol=tolerance)


def test_long_sequences_are_finite_in_values_and_gradients():
    q, k, v = torch.randn(3, 3000, 8).requires_grad_()
    y = attended(xpos(scale_base=1.0), q, k, v, torch.arange(3000))
    assert y.isfinite().all()
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


def test_an_encoder_fades_on_both_sides():
    """With q = k = 1 at one angle the score is the sum of the factors: the same for both neighbours."""
    position = xpos(2, theta=1e30, scale_base=3.0)
    eye, ones = torch.eye(5), torch.ones(5, 2)
    p = attended(position, ones, ones, eye, torch.zeros(5, dtype=torch.int64), causal=False)
    wanted = (1.4 * (0.4 / 1.4) ** ((torch.arange(5)[:, None] - torch.arange(5)).abs() / 3)).softmax(-1)
    torch.testing.assert_close(p, wanted)


def test_rotary_layers_share_its_table():
    """Without fading it is rope, and the model computes one table for both."""
    position, rope = xpos(), RopeConfig().build(1, 8)
    assert position.table_key == rope.table_key != xpos(theta=5.0).table_key
    x, tables = torch.randn(1, 3, 1, 8), rope.tables(torch.arange(3)[None])
    assert torch.equal(position.encode(x, tables), rope.encode(x, tables))


def test_attention_and_its_cache_use_the_fading():
    table = {"type": "attention", "num_heads": 2, "sliding_window": 4, "position": {"type": "xpos", "scale_base": 2.0}}
    config = {"hidden_size": 16, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": [table]}}
    ids = torch.randint(31, (1, 9))
    fading = build_model(ModelConfig.model_validate(config), 31, seed=0, device="cpu", dtype=torch.float64)
    plain_config = {**config, "blocks": {"b": [{**table, "position": {"type": "rope"}}]}}
    plain = build_model(ModelConfig.model_validate(plain_config), 31, seed=0, device="cpu", dtype=torch.float64)
    for parameter in fading.parameters():
        parameter.data.mul_(20)
    plain.load_state_dict(fading.state_dict())
    with torch.no_grad():
        logits, state = fading(ids), fading.init_state(1, 9)
        assert (logits - plain(ids)).abs().max() > 1e-3
        pieces = []
        for token in ids.split(1, dim=1):
            piece, state = fading.decode(token, state)
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=1e-5, atol=1e-6)


def test_an_odd_head_is_an_error():
    with pytest.raises(ConfigError, match="pairs"):
        xpos(7)
    assert [p.path for p in XposConfig().problems_with(7)] == [()]
    assert not list(XposConfig().problems_with(8))
