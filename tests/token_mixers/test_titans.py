"""Titans: each form against the paper's equations in loops, decoding, documents, roles, state and cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from titans_equations import (
    CPU,
    FORMS,
    ROWS,
    D,
    Equations,
    H,
    N,
    context,
    positions_of,
    site,
    titans_config,
    titans_part,
)
from torch.utils.flop_counter import FlopCounterMode

from graft.config.model import ModelConfig
from graft.contracts.registry import contracts_for
from graft.contracts.subject import Subject
from graft.errors import ConfigError
from graft.initialization import initialize
from graft.model import build_model
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.part import Context, Part, parameter_roles, tensors_of
from graft.token_mixers.attention import Attention
from graft.token_mixers.attention_config import AttentionConfig
from graft.token_mixers.titans_config import TitansConfig


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_papers_equations_in_values_and_gradients(form):
    part = titans_part(**FORMS[form]).double()
    x = torch.randn(1, 10, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *part.parameters()]
    y = part(x, context(1, 10)).y
    wanted = torch.stack(list(getattr(Equations(part), FORMS[form]["form"])(x[0])))[None]
    torch.testing.assert_close(y, wanted, rtol=1e-8, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(z.sin().sum(), inputs) for z in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def decoded(part: Part, x, chunks, segments, positions) -> torch.Tensor:
    state = part.init_state(x.shape[0], x.shape[1], device=CPU, dtype=x.dtype)
    pieces, start = [], 0
    for size in chunks:
        now = slice(start, start + size)
        out = part(x[:, now], context(x.shape[0], size, segments[:, now], positions[:, now]), state)
        pieces.append(out.y)
        state, start = out.state, start + size
    return torch.cat(pieces, dim=1)


cut_points = st.sets(st.integers(1, 18))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=3)
@given(cuts=cut_points)
def test_decoding_packed_rows_in_any_pieces_equals_each_document_alone(form, cuts):
    part = titans_part(**FORMS[form]).double()
    x, positions = torch.randn(2, 19, D, dtype=torch.float64), positions_of(ROWS)
    sizes = [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 19], strict=True)]
    with torch.no_grad():
        full = part(x, context(2, 19, ROWS, positions)).y
        pieces = decoded(part, x, sizes, ROWS, positions)
        for row, column, number in ((0, 0, 7), (0, 7, 9), (1, 3, 5), (1, 9, 8)):
            size = int((ROWS[row] == number).sum())
            here = (row, slice(column, column + size))
            alone = part(x[row : row + 1, here[1]], context(1, size)).y[0]
            torch.testing.assert_close(full[here], alone, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(pieces[here], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_reference_kernels_agree(form, dtype, tolerance):
    part, x = titans_part(**FORMS[form]).to(dtype), torch.randn(2, 19, D, dtype=dtype)
    results = []
    for part.kernels in ("auto", "reference"):
        y = part(x, context(2, 19, ROWS, positions_of(ROWS))).y[ROWS != 0]
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(part.parameters()))))
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_bf16_stays_near(form):
    part, x = titans_part(**FORMS[form]), torch.randn(2, 19, D)
    exact = part(x, context(2, 19)).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = part(x, context(2, 19)).y
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("fields", [{"form": "mac"}, {"form": "mag", "sliding_window": 64}], ids=["mac", "mag"])
@pytest.mark.parametrize("kinds", [1, 2, 64])
def test_text_that_repeats_itself_stays_finite(fields, kinds):
    """At the start, with the defaults: without `max_surprise` the steps of a chunk overshoot, each time by more."""
    mixer = {"type": "titans", "num_heads": 8, "position": {"type": "rope"}, **fields}
    data = {"hidden_size": 512, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": {"b": [mixer]}}
    model = build_model(ModelConfig.model_validate(data), 64, seed=0)
    y = model.features((torch.arange(1536) * 37 % kinds)[None]).x_BTD
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_memory_reaches_past_the_attention():
    part = titans_part(form="mag", sliding_window=2)
    x = torch.randn(1, 16, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(part(x, context(1, 16)).y[0, 12].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [t <= 12 for t in range(16)]


def test_without_a_memory_it_is_attention():
    fields = {"num_heads": N, "head_dim": H, "sliding_window": 3, "position": {"type": "rope"}}
    for causal in (True, False):
        config = TitansConfig.model_validate({"type": "titans", "neural_memory": False, **fields})
        part = config.build(site(causal=causal))
        plain = AttentionConfig.model_validate({"type": "attention", **fields}).build(site(causal=causal))
        assert isinstance(part, Attention)
        for built in (part, plain):
            initialize(built, seed=3)
        x, ctx = torch.randn(1, 9, D), Context(torch.zeros(1, 9), torch.arange(9)[None], None, causal)
        assert torch.equal(part(x, ctx).y, plain(x, ctx).y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 4}, "mac attends within its segments"),
        ({"conv_size": 4}, "no convolution"),
        ({"form": "mag"}, "needs the window"),
        ({"form": "mal"}, "needs the window"),
        ({"memory_depth": 1, "memory_intermediate_size": 8}, "nothing between its layers"),
        ({"position": {"type": "learned", "max_seq_len": 8}}, "acts on embeddings"),
        ({"neural_memory": False}, "chunk_size does nothing here"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        titans_config(**fields)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        titans_config(num_heads=5, head_dim=None).build(site())
    assert [p.path for p in titans_config(num_heads=5, head_dim=None).problems_in(D)] == [("num_heads",)]


def test_gates_and_learned_start_are_no_matrices_to_the_optimizer():
    roles = parameter_roles(titans_part(form="mag", sliding_window=4, conv_size=3))
    assert roles["memory.gate_bias"] == "scalar"
    assert {roles[f"memory.layer_{i}"] for i in (1, 2)} == {"memory_bank"}
    assert {roles[f"persistent.{n}"] for n in "kv"} == {"memory_bank"}
    assert roles["memory.conv.weight"] == "conv"
    assert roles["memory.q_proj.weight"] == roles["memory.gate_proj.weight"] == "titans"


def test_a_new_memory_forgets_slowly_and_steps_by_half():
    part = titans_config(max_memory_step=0.3).build(site())
    initialize(part, seed=1)
    writing, _ = part.memory.writing(torch.zeros(1, 1, D))
    torch.testing.assert_close(writing.step_BNC, torch.full((1, N, 1), 0.15))
    torch.testing.assert_close(writing.log_momentum_BNC.exp(), torch.full((1, N, 1), 0.5))
    torch.testing.assert_close(writing.log_keep_BNC.exp(), torch.tensor(4.0).sigmoid().expand(1, N, 1))


def test_state_is_three_memories_and_the_reach_of_the_attention():
    memory = 3 * 2 * N * H * H * 4  # weights, momentum, beginning of the chunk; two layers; fp32
    document = 2 * 8
    mac, mag = titans_part(form="mac"), titans_part(form="mag", sliding_window=6)
    keys = 2 * 2 * 3 * N * H  # keys and values, retrieved and own, of C - 1 columns
    for length in (10, 1000):
        assert mac.state_bytes(length, torch.float32) == memory + document + keys * 4 + 3 * 8
        assert mag.state_bytes(length, torch.bfloat16) == memory + document + 6 * 2 * N * H * 2
    state = mac.init_state(2, 10, device=CPU, dtype=torch.bfloat16)
    after = mac.to(torch.bfloat16)(torch.randn(2, 3, D, dtype=torch.bfloat16), context(2, 3), state).state
    kinds = [[(t.shape, t.dtype) for t in tensors_of(s)] for s in (state, after)]
    assert kinds[0] == kinds[1], "a step keeps shapes and dtypes"


def traced(part: Part, T: int) -> int:
    with FlopCounterMode(display=False) as counter:
        part(torch.randn(1, T, D), context(1, T))
    return counter.get_total_flops()


@pytest.mark.parametrize("T", [3, 14])
def test_counted_flops_are_those_traced(T):
    """Less the pairs that the attention's squares compute and mask."""
    mac = titans_part(form="mac", num_persistent_tokens=3)
    masked = sum(c * (c - 1) for c in (min(4, T - first) for first in range(0, T, 4)))
    assert traced(mac, T) == round(mac.flops_per_token(T) * T) + 4 * N * H * masked
    for form in ("mag", "mal"):
        part = titans_part(form=form, sliding_window=T, num_persistent_tokens=3, memory_depth=3)
        assert traced(part, T) == round(part.flops_per_token(T) * T) + 4 * N * H * (T * (T - 1) // 2)


@pytest.mark.parametrize("form", ["mac", "mag", "mal"])
def test_cost_grows_with_the_length_alone(form):
    part = titans_part(form=form, sliding_window=None if form == "mac" else 8)
    assert traced(part, 64) == 2 * traced(part, 32) == 4 * traced(part, 16)


FADING = ({"type": "hope", "damping": 0.1}, {"type": "xpos", "scale_base": 4.0})


@pytest.mark.parametrize("form", ["mac", "mag", "mal"])
@pytest.mark.parametrize("position", FADING, ids=["hope", "xpos"])
def test_fading_positions_hold_the_contracts_of_decoders(form: str, position: dict[str, Any]) -> None:
    part = {**FORMS[form], "type": "titans", "num_heads": 2, "position": position}
    blocks = {"layer": [part, {"type": "mlp", "intermediate_size": 16}]}
    model = {"hidden_size": 16, "num_layers": 2, "norm": {"type": "rms_norm"}, "blocks": blocks}
    subject = Subject(ModelConfig.model_validate(model), CausalLMConfig())
    for contract in contracts_for(subject):
        contract(subject)
