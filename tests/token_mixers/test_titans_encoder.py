"""Titans in encoders: each form against loops over both directions, documents, turned rows, contracts and cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titans_equations import FORMS, ROWS, BothWays, D, H, N, context, positions_of, titans_part
from torch.utils.flop_counter import FlopCounterMode

from graft.config.model import ModelConfig
from graft.contracts.registry import contracts_for
from graft.contracts.subject import Subject
from graft.contracts.training import compiled_equals_eager
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.token_mixers.titans_base import Titans

HOPE = {"type": "hope", "damping": 0.1}
ENCODERS: dict[str, dict[str, Any]] = {
    **FORMS,
    "mac, hope": {"form": "mac", "position": HOPE, "memory_depth": 1},
    "mal, hope": {"form": "mal", "sliding_window": 3, "position": HOPE, "conv_size": 4},
    "mag, xpos": {"form": "mag", "sliding_window": 3, "position": {"type": "xpos", "scale_base": 4.0}},
}


def encoder(form: str) -> Titans:
    return titans_part(causal=False, **ENCODERS[form]).double()


@pytest.mark.parametrize("form", ENCODERS)
def test_every_form_is_loops_over_both_directions_in_values_and_gradients(form):
    part = encoder(form)
    x = torch.randn(1, 10, D, dtype=torch.float64, requires_grad=True)
    y, wanted = part(x, context(1, 10, causal=False)).y, BothWays(part)(x[0])[None]
    torch.testing.assert_close(y, wanted, rtol=1e-8, atol=1e-9)
    inputs = [x, *part.parameters()]
    for a, b in zip(*(torch.autograd.grad(z.sin().sum(), inputs) for z in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("form", ENCODERS)
def test_documents_of_packed_rows_are_those_alone_from_either_side(form):
    part, x = encoder(form), torch.randn(2, 19, D, dtype=torch.float64)
    packed = part(x, context(2, 19, ROWS, positions_of(ROWS), causal=False)).y
    for row, numbers in enumerate(ROWS):
        for number in set(numbers.tolist()) - {0}:
            here = numbers == number
            alone = part(x[row : row + 1, here], context(1, int(here.sum()), causal=False)).y[0]
            torch.testing.assert_close(packed[row, here], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ENCODERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_reference_kernels_agree(form, dtype, tolerance):
    part, x = encoder(form).to(dtype), torch.randn(2, 19, D, dtype=dtype)
    rows = torch.where(torch.arange(19) == 13, 0, ROWS)  # padding inside a document too
    results = []
    for part.kernels in ("auto", "reference"):
        y = part(x, context(2, 19, rows, positions_of(rows), causal=False)).y[rows != 0]
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(part.parameters()))))
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).abs().max() <= tolerance * plain.abs().max()


@st.composite
def rows_of_documents(draw: st.DrawFn) -> torch.Tensor:
    """One row, [1, T]: documents one after the other, padding before and after."""
    sizes = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    numbers = [number for number, size in enumerate(sizes, start=1) for _ in range(size)]
    return torch.tensor([[0] * before + numbers + [0] * after])


@torch.no_grad()
@pytest.mark.parametrize("form", [form for form in ENCODERS if ENCODERS[form].get("conv_size") != 4])
@settings(max_examples=4)
@given(rows=rows_of_documents())
def test_a_turned_row_gives_the_turned_result(form, rows):
    """Tokens take their position's number along."""
    part, T = encoder(form), rows.shape[1]
    if part.memory.conv is not None:  # an odd kernel, centred: made the same from either side
        weight = part.memory.conv.weight
        weight.copy_((weight + weight.flip(1)) / 2)
    x, positions = torch.randn(1, T, D, dtype=torch.float64), positions_of(rows)
    y = part(x, context(1, T, rows, positions, causal=False)).y
    turned = part(x.flip(1), context(1, T, rows.flip(1), positions.flip(1), causal=False)).y
    real = rows != 0
    torch.testing.assert_close(turned.flip(1)[real], y[real], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["mac", "mag", "mal"])
def test_a_memory_reaches_past_the_attention_on_both_sides(form):
    part = titans_part(causal=False, form=form, sliding_window=None if form == "mac" else 2)
    x = torch.randn(1, 16, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(part(x, context(1, 16, causal=False)).y[0, 9].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).all()


def test_what_both_directions_say_is_averaged():
    """A memory that never changes says in an encoder what it says in a decoder."""
    results = []
    for causal in (True, False):
        torch.manual_seed(0)
        part = titans_part(causal=causal, form="mag", sliding_window=1)
        with torch.no_grad():  # no step, nothing forgotten
            part.memory.gate_bias.copy_(torch.tensor([-100.0, 0.0, -100.0])[:, None].expand(3, N))
        results.append(part(torch.randn(1, 9, D), context(1, 9, causal=causal)).y)
    torch.testing.assert_close(*results)


def subject(form: str, **fields: Any) -> Subject:
    """A small encoder of a form."""
    part = {**ENCODERS[form], "type": "titans", "num_heads": 2, "chunk_size": 4, **fields}
    blocks = {"layer": [{"position": {"type": "rope"}, **part}, {"type": "mlp", "intermediate_size": 16}]}
    model = {"hidden_size": 16, "num_layers": 2, "norm": {"type": "rms_norm"}, "blocks": blocks, "bidirectional": True}
    return Subject(ModelConfig.model_validate(model), CausalLMConfig())


@pytest.mark.parametrize("form", ["mac", "mag", "mal", "mac, hope"])
def test_contracts_of_encoders(form):
    shown = subject(form)
    for contract in contracts_for(shown):
        contract(shown)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("form", ["mac", "mag", "mal"])
def test_compiled_encoders(form):
    compiled_equals_eager(subject(form))


def traced(part: Titans, T: int) -> int:
    with FlopCounterMode(display=False) as counter:
        part(torch.randn(1, T, D), context(1, T, causal=False))
    return counter.get_total_flops()


@pytest.mark.parametrize("T", [3, 14])
def test_counted_flops_are_those_traced(T):
    """An encoder masks no pair of a document whose window holds it all."""
    for form in ("mac", "mag", "mal"):
        window = None if form == "mac" else T
        part = titans_part(causal=False, form=form, sliding_window=window, num_persistent_tokens=3, memory_depth=3)
        assert traced(part, T) == round(part.flops_per_token(T) * T)


def test_a_window_has_two_sides_in_what_is_counted():
    """Every query but those at the ends sees W - 1 keys on either side."""
    T, W = 20, 3
    part, all_of_it = (
        titans_part(causal=False, form="mal", sliding_window=window, num_persistent_tokens=0) for window in (W, T)
    )
    pairs = T * (2 * W - 1) - W * (W - 1)
    difference = all_of_it.flops_per_token(T) - part.flops_per_token(T)
    assert round(difference * T) == 4 * N * H * (T * T - pairs)


@pytest.mark.parametrize("form", ["mac", "mag", "mal"])
def test_cost_grows_with_the_length_alone(form):
    part = titans_part(causal=False, form=form, sliding_window=None if form == "mac" else 8)
    assert traced(part, 64) == 2 * traced(part, 32) == 4 * traced(part, 16)
