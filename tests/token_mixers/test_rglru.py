"""The real-gated linear recurrence: RecurrentGemma's block as oracle, documents, decoding, cost."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recurrent_checks import (
    CPU,
    assert_decoding_equals_forward,
    assert_documents_are_alone,
    build,
    context,
    decoded,
    splits,
    states_around_padding,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from graft.config.roles import NO_DECAY
from graft.ops.documents import find_documents
from graft.ops.linear_scan import linear_scan
from graft.part import parameter_roles
from graft.token_mixers.rglru import RGLRU, steps
from graft.token_mixers.rglru_config import RGLRUConfig

NAMES = {
    "linear_y.weight": "gate_proj.weight",
    "linear_y.bias": "gate_proj.bias",
    "linear_x.weight": "x_proj.weight",
    "linear_x.bias": "x_proj.bias",
    "linear_out.weight": "o_proj.weight",
    "linear_out.bias": "o_proj.bias",
    "conv_1d.weight": "conv.weight",
    "conv_1d.bias": "conv.bias",
    "rg_lru.recurrent_param": "recurrence.decay_parameter",
    "rg_lru.input_gate_weight": "recurrence.input_gate.weight",
    "rg_lru.input_gate_bias": "recurrence.input_gate.bias",
    "rg_lru.recurrent_gate_weight": "recurrence.recurrence_gate.weight",
    "rg_lru.recurrent_gate_bias": "recurrence.recurrence_gate.bias",
}
"""A parameter of transformers' block -> the same here."""


def part(*, causal: bool = True, **fields) -> RGLRU:
    built = build(RGLRUConfig.model_validate({"type": "rglru", "num_heads": 4, **fields}), causal=causal)
    assert isinstance(built, RGLRU)
    return built


def pair() -> tuple[RecurrentGemmaRecurrentBlock, RGLRU]:
    """Transformers' block and ours with the same random weights (there the recurrence's width is the stream's)."""
    sizes = {"hidden_size": 24, "lru_width": 24, "num_attention_heads": 4, "conv1d_width": 4, "num_hidden_layers": 1}
    theirs = RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(**sizes), 0).double()
    theirs.rg_lru._rnn_scan = functools.partial(theirs.rg_lru._rnn_scan, acc_dtype=torch.float64)  # else fp32
    ours = part(projection_bias=True)
    mine = dict(ours.named_parameters())
    assert {NAMES[name] for name, _ in theirs.named_parameters()} == mine.keys()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))  # not near a = 1, where theirs bounds the root's slope
            mine[NAMES[name]].copy_(parameter.view_as(mine[NAMES[name]]))
    return theirs, ours


TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("T", [1, 5, 37])
def test_values_and_gradients_are_those_of_recurrent_gemma(T):
    theirs, ours = pair()
    x = torch.randn(2, T, 24, dtype=torch.float64)
    wanted = theirs(x, torch.arange(T).expand(2, T), None, use_cache=False)[0]
    y = ours(x, context(x)).y
    torch.testing.assert_close(y, wanted, **TOLERANCE)
    direction = torch.randn_like(y)
    (wanted * direction).sum().backward()
    (y * direction).sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        own = mine[NAMES[name]].grad
        assert own is not None
        torch.testing.assert_close(own.view_as(parameter), parameter.grad, **TOLERANCE, msg=name)


@torch.no_grad()
def test_decoding_is_that_of_recurrent_gemma():
    theirs, ours = pair()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    wanted = [theirs(x[:, :4], torch.arange(4).expand(2, 4), None)[0]]
    wanted += [theirs(x[:, t : t + 1], torch.full((2, 1), t), None)[0] for t in range(4, 9)]
    y, _ = decoded(ours, x, [4, 1, 1, 1, 1, 1])
    torch.testing.assert_close(y, torch.cat(wanted, dim=1), **TOLERANCE)


def test_documents_begin_as_in_recurrent_gemma():
    """The recurrence alone: their convolution reads across borders, which ours does not."""
    theirs, ours = pair()
    u = torch.randn(2, 7, 24, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]])
    wanted = theirs.rg_lru(u, positions)
    segments = torch.tensor([[5, 5, 5, 2, 2, 2, 2], [1, 9, 9, 9, 9, 9, 9]])
    h = linear_scan(*steps(*ours.recurrence(u), find_documents(segments)))
    torch.testing.assert_close(h, wanted, **TOLERANCE)


def encoded(names: dict[str, torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    """An encoder's layer for one document: what comes from before, from after, and from the position itself."""
    T, padded = len(x_TD), torch.nn.functional.pad(x_TD @ names["x_proj.weight"].mT, (0, 0, 2, 1))
    u = names["conv.bias"] + torch.as_tensor(sum(padded[i : i + T] * names["conv.weight"][:, i] for i in range(4)))

    def gate(name: str) -> torch.Tensor:
        weight, bias = names[f"recurrence.{name}.weight"], names[f"recurrence.{name}.bias"]
        return torch.sigmoid(u @ torch.block_diag(*weight) + bias)

    softplus = names["recurrence.decay_parameter"].exp().log1p()
    decay, gated = (-8.0 * softplus * gate("recurrence_gate")).exp(), gate("input_gate") * u
    inner = (1 - decay**2).sqrt() * gated
    rows = []
    for t in range(T):
        h = gated[t] if t in (0, T - 1) else inner[t]
        for s in range(T):  # the first position enters whole on the way there, the last on the way back
            if s != t:
                entering = gated[s] if s == (0 if s < t else T - 1) else inner[s]
                h = h + (decay[s + 1 : t + 1] if s < t else decay[t:s]).prod(0) * entering
        rows.append(h)
    branch = torch.nn.functional.gelu(x_TD @ names["gate_proj.weight"].mT, approximate="tanh")
    return (branch * torch.stack(rows)) @ names["o_proj.weight"].mT


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("T", [1, 2, 9, 37])
def test_values_and_gradients_of_an_encoder_are_those_of_its_two_ways(T, kernels):
    built = part(causal=False)
    built.kernels = kernels
    names = dict(built.named_parameters())
    x, direction = torch.randn(2, 2, T, 24, dtype=torch.float64)
    wanted, y = torch.stack([encoded(names, row) for row in x]), built(x, context(x, causal=False)).y
    torch.testing.assert_close(y, wanted, **TOLERANCE)
    how = {"allow_unused": T == 1, "materialize_grads": T == 1}  # a token alone reads no decay
    results = [torch.autograd.grad((z * direction).sum(), list(names.values()), **how) for z in (y, wanted)]
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(kernels, causal):
    built = part(intermediate_size=32, causal=causal)
    built.kernels = kernels
    assert_documents_are_alone(built, causal=causal)


@settings(max_examples=15)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_equals_forward(sizes, packed):
    assert_decoding_equals_forward(part(), sizes, packed=packed)


def test_padding_leaves_the_state_of_the_recurrence_as_it_was():
    before, padded = states_around_padding(part())
    torch.testing.assert_close(padded.h_BF, before.h_BF)
    assert padded.segment_B.tolist() == before.segment_B.tolist() == [3]


def test_decays_start_in_their_range():
    built = part(intermediate_size=256, min_decay=0.5, max_decay=0.8, decay_exponent=3.0)
    open_gate = (-3.0 * torch.nn.functional.softplus(built.recurrence.decay_parameter)).exp()
    assert 0.5 <= open_gate.min() < 0.55
    assert 0.75 < open_gate.max() <= 0.8


def test_closed_gates_give_finite_gradients():
    """A decay of exactly 1 adds nothing, and its root has no infinite slope."""
    built = part().float()
    with torch.no_grad():
        built.recurrence.recurrence_gate.bias.fill_(-200.0)
    x = torch.randn(1, 8, 24)
    built(x, context(x)).y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in built.parameters())


def test_roles_cost_and_state():
    built = part(intermediate_size=32)
    roles = parameter_roles(built)
    assert roles["recurrence.decay_parameter"] == "scalar"
    assert roles["conv.weight"] == "conv"
    assert roles["recurrence.input_gate.weight"] == roles["x_proj.weight"] == "recurrence"
    assert roles["recurrence.input_gate.bias"] == "bias"
    assert "scalar" in NO_DECAY
    for causal in (True, False):
        x, one = torch.randn(1, 20, 24, dtype=torch.float64), part(intermediate_size=32, causal=causal)
        with FlopCounterMode(display=False) as counter:
            one(x, context(x, causal=causal))
        assert counter.get_total_flops() == 20 * one.flops_per_token(20)
    assert built.state_bytes(10, torch.float32) == 32 * 4 + 3 * (32 * 4 + 8) + 8
    assert built.state_bytes(9999, torch.bfloat16) == 32 * 4 + 3 * (32 * 2 + 8) + 8
    state = built.init_state(2, 3, device=CPU, dtype=torch.bfloat16)
    assert state.h_BF.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"min_decay": 0.9, "max_decay": 0.5}, "above max_decay"),
        ({"intermediate_size": 30}, "does not divide intermediate_size 30"),
    ],
)
def test_impossible_configs_are_refused(fields, problem):
    with pytest.raises(ValidationError, match=problem):
        part(**fields)
    width = RGLRUConfig(num_heads=5)
    assert "does not divide hidden_size 24" in next(width.problems_in(24)).message
