"""Gated linear attention as a part: its formula token by token as oracle, documents, decoding, cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import (
    ROWS,
    assert_decoding_equals_forward,
    assert_documents_are_alone,
    build,
    context,
    splits,
    states_around_padding,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.errors import ConfigError
from graft.part import parameter_roles
from graft.token_mixers.gla import GLA
from graft.token_mixers.gla_config import GLAConfig


def part(*, causal: bool = True, **fields) -> GLA:
    config = GLAConfig.model_validate({"type": "gla", "num_heads": 2, "gate_low_rank_dim": 3, **fields})
    built = build(config, causal=causal)
    assert isinstance(built, GLA)
    return built


def by_the_paper(names: dict[str, Tensor], x_TD: Tensor, *, num_heads: int, temperature: float, causal: bool) -> Tensor:
    """The layer for one sequence as the paper writes it: head by head, token by token.

    In an encoder a second memory goes from the last token to the first, and is read before it is written.
    """
    wq, wk, wv, wg = (names[f"{n}_proj.weight"].chunk(num_heads) for n in ("q", "k", "v", "gate"))
    decay_up, bias = names["decay_up_proj.weight"].chunk(num_heads), names["decay_up_proj.bias"].chunk(num_heads)
    T, heads = len(x_TD), []
    for n in range(num_heads):
        alphas = [
            torch.sigmoid(decay_up[n] @ (names["decay_down_proj.weight"] @ x) + bias[n]) ** (1 / temperature)
            for x in x_TD
        ]
        read = [torch.zeros(len(wv[n]), dtype=x_TD.dtype)] * T
        for back in (False,) if causal else (False, True):
            memory = torch.zeros(len(wq[n]), len(wv[n]), dtype=x_TD.dtype)
            for t in reversed(range(T)) if back else range(T):
                faded = alphas[t][:, None] * memory
                memory = faded + torch.outer(wk[n] @ x_TD[t], wv[n] @ x_TD[t])
                read[t] = read[t] + (faded if back else memory).mT @ (wq[n] @ x_TD[t]) / len(wq[n]) ** 0.5
        rows = []
        for x, o in zip(x_TD, read, strict=True):
            gate = wg[n] @ x
            normed = o / (o.square().mean() + 1e-6).sqrt() * names["head_norm.weight"]
            rows.append(normed * gate * torch.sigmoid(gate))
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ names["o_proj.weight"].mT


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 9, 70])
@pytest.mark.parametrize("fields", [{}, {"num_heads": 3, "head_dim": 5, "v_head_dim": 7, "gate_temperature": 2.0}])
def test_values_and_gradients_are_the_papers(T, fields, causal):
    built = part(causal=causal, **fields)
    names = dict(built.named_parameters())
    with torch.no_grad():
        for parameter in names.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, direction = torch.randn(2, T, 24, dtype=torch.float64), torch.randn(2, T, 24, dtype=torch.float64)
    how = {"num_heads": built.num_heads, "temperature": built.temperature, "causal": causal}
    wanted = torch.stack([by_the_paper(names, row, **how) for row in x])
    y = built(x, context(x, causal=causal)).y
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-10)
    expected = torch.autograd.grad((wanted * direction).sum(), list(names.values()))
    actual = torch.autograd.grad((y * direction).sum(), list(names.values()))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(kernels, causal):
    built = part(causal=causal)
    built.kernels = kernels
    assert_documents_are_alone(built, causal=causal)


def test_an_encoder_of_a_row_turned_round_is_turned_round():
    built = part(causal=False)
    x, segments = torch.randn(3, 11, 24, dtype=torch.float64), torch.tensor(ROWS)
    y = built(x, context(x, segments, causal=False)).y
    turned = built(x.flip(1), context(x, segments.flip(1), causal=False)).y.flip(1)
    torch.testing.assert_close(turned[segments != 0], y[segments != 0], rtol=1e-9, atol=1e-11)


@settings(max_examples=15)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_equals_forward(sizes, packed):
    assert_decoding_equals_forward(part(), sizes, packed=packed)


def test_padding_leaves_the_state_as_it_was():
    before, padded = states_around_padding(part())
    torch.testing.assert_close(padded, before)


def test_only_the_past_gets_a_gradient():
    x = torch.randn(1, 70, 24, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(part()(x, context(x)).y[0, 66].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [t <= 66 for t in range(70)]


def test_roles_and_state():
    built = part()
    roles = parameter_roles(built)
    assert roles["decay_up_proj.bias"] == "bias"
    assert roles["head_norm.weight"] == "norm"
    assert {role for name, role in roles.items() if name.endswith("proj.weight")} == {"recurrence"}
    for length in (1, 9999):
        assert built.state_bytes(length, torch.bfloat16) == 2 * 6 * 12 * 4 + 8
        assert built.state_bytes(length, torch.float64) == 2 * 6 * 12 * 8 + 8


@pytest.mark.parametrize("causal", [True, False])
def test_counted_flops_are_those_of_the_forward(causal):
    built = part(causal=causal)
    for T in (1, 20, 130):
        x = torch.randn(1, T, 24, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            built(x, context(x, causal=causal))
        assert counter.get_total_flops() == pytest.approx(T * built.flops_per_token(T), rel=1e-12)


def test_heads_that_do_not_divide_the_width_are_a_problem():
    config = GLAConfig(num_heads=5)
    with pytest.raises(ConfigError, match=r"^layer 0: gla.num_heads: .* does not divide .*; set head_dim, or another"):
        part(num_heads=5, head_dim=None)
    assert [p.fix for p in config.problems_in(24)] == [
        "set head_dim, or another number of heads",
        "set v_head_dim, or another number of heads",
    ]
    assert not list(GLAConfig(num_heads=5, head_dim=4, v_head_dim=4).problems_in(24))
