"""Retention against the paper's equations, written out with complex rotations, one pair of positions at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recurrent_checks import (
    CPU,
    ROWS,
    assert_decoding_equals_forward,
    assert_documents_are_alone,
    build,
    splits,
)
from torch.utils.flop_counter import FlopCounterMode

from graft.errors import ConfigError
from graft.part import Context, parameter_roles, tensors_of
from graft.positions.rope import Rope
from graft.token_mixers.retention import Retention, log_factors
from graft.token_mixers.retention_config import RetentionConfig

NONE = {"type": "none"}


def retention(*, causal: bool = True, **fields: Any) -> Retention:
    config = RetentionConfig.model_validate({"type": "retention", "num_heads": 2, "chunk_size": 4, **fields})
    part = build(config, causal=causal)
    assert isinstance(part, Retention)
    return part


def context(T: int, *, batch: int = 2, segments=None, positions=None, causal: bool = True, **tables) -> Context:
    positions = torch.arange(T).expand(batch, T) if positions is None else positions
    return Context(torch.zeros(batch, T, dtype=torch.int64), positions, segments, causal, **tables)


def angles_of(T: int, half: int) -> torch.Tensor:
    """nθ in fp64: [T, H/2]."""
    exponents = -torch.arange(half, dtype=torch.float64) / half
    return torch.arange(T, dtype=torch.float64)[:, None] * 10_000.0**exponents


def rotated(x_TH: torch.Tensor) -> torch.Tensor:
    """e^{inθ} on channels (i, i + H/2) as complex numbers: [T, H/2]."""
    half = x_TH.shape[-1] // 2
    angles = angles_of(x_TH.shape[0], half)
    return torch.complex(x_TH[:, :half], x_TH[:, half:]) * torch.polar(torch.ones_like(angles), angles)


def by_the_paper(part: Retention, x_TD: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Equations 5 and 8 and the normalisations of section 2.4, for one document."""
    weights, T = dict(part.named_parameters()), x_TD.shape[0]
    H, V, heads = part.head_dim, part.value_dim, []
    for head in range(part.num_heads):
        q, k, v = (
            x_TD @ weights[f"{name}_proj.weight"][head * size : (head + 1) * size].mT
            for name, size in (("q", H), ("k", H), ("v", V))
        )
        gamma = [31 / 32, 511 / 512][head]
        distance = torch.arange(T)[:, None] - torch.arange(T)
        D = gamma ** distance.abs().double()
        if causal:
            D = D * (distance >= 0)
        if part.score_norm:
            D = D / D.sum(1, keepdim=True).sqrt()
        turned = isinstance(part.position, Rope)
        pairs = (rotated(q) @ rotated(k).mH).real if turned else q @ k.mT
        R = pairs / H**0.5 * D
        if part.score_norm:
            R = R / R.sum(1, keepdim=True).abs().clamp_min(1.0)
        y = R @ v
        if part.head_norm == "layer_norm":
            y = y - y.mean(-1, keepdim=True)
        heads.append(y / (y.square().mean(-1, keepdim=True) + part.head_norm_eps).sqrt())
    gate = x_TD @ weights["gate_proj.weight"].mT
    return (gate * gate.sigmoid() * torch.cat(heads, 1)) @ weights["o_proj.weight"].mT


def assert_same(part: Retention, actual: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(expected)
    wanted_by = [x, *part.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), wanted_by, retain_graph=True) for y in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"head_norm_eps": 0.3},
        {"head_norm_eps": 0.3, "score_norm": False},
        {"head_norm": "layer_norm", "head_norm_eps": 0.1, "position": NONE, "head_dim": 5, "value_factor": 1},
    ],
    ids=["paper", "plain scores", "layer norm"],
)
def test_values_and_gradients_are_those_of_the_paper(fields, causal, kernels):
    """A large eps keeps the head norm from hiding the normalisation of scores."""
    part = retention(causal=causal, **fields)
    part.kernels = kernels
    x = (3 * torch.randn(2, 11, 24, dtype=torch.float64)).requires_grad_()
    wanted = torch.stack([by_the_paper(part, row, causal=causal) for row in x])
    exact = {}
    if isinstance(part.position, Rope):  # its own tables are fp32
        angles = angles_of(11, part.head_dim // 2)[None, :, None]
        exact = {part.position.table_key: (angles.cos(), angles.sin())}
    assert_same(part, part(x, context(11, causal=causal, tables=exact)).y, wanted, x)


def test_score_norm_acts_on_these_inputs():
    """Else the test above could not tell it from none: some row sums are above 1 and some below."""
    part = retention()
    x = 3 * torch.randn(2, 11, 24, dtype=torch.float64)
    plain = retention(score_norm=False)
    plain.load_state_dict(part.state_dict())
    normed, raw = (p.retain(x, context(11), None)[0] for p in (part, plain))
    index = torch.arange(1.0, 12.0, dtype=torch.float64)
    factors = log_factors(2, device=CPU, dtype=torch.float64).exp()
    roots = torch.stack([(1 - g**index) / (1 - g) for g in factors], -1).sqrt()
    ratio = raw / roots[..., None] / normed
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert (ratio > 1.001).any()
    assert (ratio - 1).abs().min() < 1e-9


def test_factors_are_those_of_the_paper():
    """1 − 2^(−5 − i) for eight heads would end at 1 − 2^−12; these go from 1 − 1/32 to 1 − 1/512, evenly in the log."""
    factors = log_factors(5, device=CPU, dtype=torch.float64).exp()
    torch.testing.assert_close(factors, 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / 512]).double())
    assert log_factors(1, device=CPU, dtype=torch.float64).exp().item() == pytest.approx(31 / 32)


@settings(max_examples=25)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_in_any_chunks_equals_the_forward(sizes, packed):
    assert_decoding_equals_forward(retention(position=NONE, head_norm_eps=0.3), sizes, packed=packed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(causal, kernels):
    part = retention(position=NONE, causal=causal, head_norm_eps=0.3)
    part.kernels = kernels
    assert_documents_are_alone(part, causal=causal)


def test_padding_leaves_the_state_alone():
    part = retention(position=NONE, head_norm_eps=0.3)
    x = torch.randn(3, 11, 24, dtype=torch.float64)
    state = part.init_state(3, 11, device=CPU, dtype=x.dtype)
    before = part(x[:, :5], context(5, batch=3, segments=torch.tensor(ROWS)[:, :5]), state).state
    after = part(x[:, 5:8], context(3, batch=3, segments=torch.zeros(3, 3, dtype=torch.int64)), before).state
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)


def test_rotation_follows_the_positions_given():
    """Only differences count: shifted positions give the same numbers, stretched ones do not."""
    part, x = retention(), torch.randn(1, 9, 24, dtype=torch.float64)
    plain = part(x, context(9, batch=1)).y
    shifted = part(x, context(9, batch=1, positions=torch.arange(9)[None] + 50)).y
    stretched = part(x, context(9, batch=1, positions=torch.arange(9)[None] * 2)).y
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-5)
    assert (stretched - plain).abs().max() > 1e-3


def test_the_state_is_one_matrix_per_head_whatever_the_length():
    part = retention()
    matrix = 2 * 12 * (24 + 1) * 4
    assert part.state_bytes(10, torch.bfloat16) == part.state_bytes(100_000, torch.float32) == matrix + 16
    assert retention(score_norm=False).state_bytes(9, torch.float32) == 2 * 12 * 24 * 4 + 16
    state = part.init_state(1, 9, device=CPU, dtype=torch.bfloat16)
    assert next(tensors_of(state)).dtype == torch.float32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fields", [{}, {"score_norm": False, "head_dim": 6, "value_factor": 3}])
@pytest.mark.parametrize("T", [16, 11, 3])
def test_counted_flops_are_those_of_the_forward(T, fields, causal):
    part = retention(causal=causal, **fields)
    with FlopCounterMode(display=False) as counter:
        part(torch.randn(2, T, 24, dtype=torch.float64), context(T, causal=causal))
    assert counter.get_total_flops() == pytest.approx(2 * T * part.flops_per_token(T), rel=1e-12)


def test_long_sequences_stay_finite_in_bf16():
    part = retention(chunk_size=64).bfloat16()
    x = torch.randn(1, 3000, 24, dtype=torch.bfloat16).requires_grad_()
    y = part(x, context(3000, batch=1)).y
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert grad.isfinite().all()


def test_names_roles_and_size():
    roles = parameter_roles(retention())
    assert roles == {f"{name}_proj.weight": "retention" for name in ("q", "k", "v", "gate", "o")}
    assert retention().active_parameters() == 8 * 24 * 24


def test_heads_that_do_not_fit_are_an_error():
    with pytest.raises(ConfigError, match="does not divide"):
        retention(num_heads=5)
    problems = list(RetentionConfig(num_heads=5).problems_in(24))
    assert [p.path for p in problems] == [("num_heads",)]
    odd = list(RetentionConfig(num_heads=8).problems_in(24))
    assert [p.path for p in odd] == [("position", "partial_rotary_factor")]
    assert not list(RetentionConfig(num_heads=8, head_dim=4).problems_in(30))


def test_positions_it_cannot_use_are_refused():
    with pytest.raises(ValidationError, match="alibi"):
        RetentionConfig.model_validate({"type": "retention", "num_heads": 2, "position": {"type": "alibi"}})


def test_meta_forward():
    part = retention().to("meta")
    nothing = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    x = torch.empty(2, 9, 24, dtype=torch.float64, device="meta")
    assert part(x, Context(nothing, nothing, nothing)).y.shape == (2, 9, 24)
