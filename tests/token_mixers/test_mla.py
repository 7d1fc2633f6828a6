"""Latent attention: its two forms, its state, its cost, YaRN's factors, and what its config says."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.config.advice import warnings
from graft.config.load import load_experiment
from graft.config.model import InitConfig, ModelConfig
from graft.contracts.registry import contracts_for
from graft.contracts.subject import Subject
from graft.initialization import initialize
from graft.linears.dense import Dense
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.part import Context, Site, parameter_roles, tensors_of
from graft.positions.rope import attention_factor
from graft.token_mixers.mla import MLA
from graft.token_mixers.mla_config import MLAConfig

CPU = torch.device("cpu")
PRESET = Path(__file__).parents[2] / "presets/token_mixers/mla.yaml"
SIZES = {"num_heads": 3, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {"type": "rope", "scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16}}


def mla(*, causal: bool = True, dtype: torch.dtype = torch.float64, **fields: Any) -> MLA:
    config = MLAConfig.model_validate({"type": "mla", **SIZES, **fields})
    part = config.build(Site(24, 0, 2, 4, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3)))
    initialize(part, seed=1)
    return part.to(dtype)


def context(x: Tensor, *, start: int = 0, segments: Tensor | None = None, causal: bool = True) -> Context:
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64), positions, segments, causal)


def stream(T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, 24, dtype=torch.float64).to(dtype)


def splits(total: int) -> st.SearchStrategy[list[int]]:
    """Lists of positive sizes that add up to ``total``."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda c: [b - a for a, b in itertools.pairwise([0, *sorted(c), total])])


def values_and_gradients(part: MLA, form: Any, x: Tensor, ctx: Context) -> list[Tensor]:
    part.zero_grad()
    x = x.detach().requires_grad_()
    out = form(*part.project(x, ctx), causal=ctx.causal)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * direction).sum().backward()
    return [out.detach(), x.grad, *(p.grad for n, p in part.named_parameters() if "o_proj" not in n)]


HOPE = {"type": "hope", "damping": 0.1}
XPOS = {"type": "xpos", "scale_base": 4.0}
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": 7, "sliding_window": 4, "position": YARN},
        {"position": HOPE},
        {"position": XPOS, "rope_interleave": True},
    ],
)
def test_both_forms_agree_in_values_and_gradients(dtype, tolerance, causal, fields):
    part, x = mla(causal=causal, dtype=dtype, **fields), stream(9, dtype)
    segments = torch.tensor([[0, 7, 7, 7, 7, 2, 2, 2, 0], [5] * 9])
    ctx = context(x, segments=segments, causal=causal)
    exact = mla(causal=causal, **fields)
    exact.load_state_dict(part.state_dict())
    wanted = values_and_gradients(exact, exact.expanded, x.double(), ctx)
    for form in (part.expanded, part.absorbed):
        for a, b in zip(values_and_gradients(part, form, x, ctx), wanted, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@settings(max_examples=40)
@given(
    chunks=splits(13),
    window=st.sampled_from([None, 1, 2, 5, 12, 13, 40]),
    packed=st.booleans(),
    form=st.sampled_from(["auto", "absorbed", "expanded", "reference"]),
)
def test_decoding_in_any_chunks_and_either_form_equals_the_full_forward(chunks, window, packed, form):
    part, x = mla(sliding_window=window, q_lora_rank=7), stream(13)
    if form == "reference":
        part.kernels = "reference"
    elif form != "auto":
        part._absorbs = lambda *_: form == "absorbed"
    rows = [[0, 0, 0, 9, 9, 9, 9, 9, 9, 2, 2, 2, 2], [3] * 13]
    segments = torch.tensor(rows) if packed else None
    state = part.init_state(2, 13, device=CPU, dtype=x.dtype)
    pieces, edges = [], [0, *itertools.accumulate(chunks)]
    with torch.no_grad():
        whole = part(x, context(x, segments=segments)).y
        for start, end in itertools.pairwise(edges):
            now = None if segments is None else segments[:, start:end]
            out = part(x[:, start:end], context(x[:, start:end], start=start, segments=now), state)
            state = out.state
            pieces.append(out.y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-11)


def test_steps_without_segments_after_padded_ones_continue_document_1():
    part, x = mla(sliding_window=4), stream(6)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    whole = part(x, context(x, segments=segments)).y
    state = part.init_state(2, 6, device=CPU, dtype=x.dtype)
    out = part(x[:, :4], context(x[:, :4], segments=segments[:, :4]), state)
    outs = [out.y]
    for t in (4, 5):
        out = part(x[:, t : t + 1], context(x[:, t : t + 1], start=t), out.state)
        outs.append(out.y)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)


def test_the_cheaper_form_is_taken(monkeypatch):
    """A step absorbs, a prefill expands; `reference` and linear maps of another kind always expand."""
    taken: list[str] = []
    for name in ("absorbed", "expanded"):
        form = getattr(MLA, name)
        monkeypatch.setattr(MLA, name, lambda self, *a, _f=form, _n=name, **k: (taken.append(_n), _f(self, *a, **k))[1])

    def run(part: MLA) -> list[str]:
        taken.clear()
        x, state = stream(9), part.init_state(2, 9, device=CPU, dtype=torch.float64)
        state = part(x[:, :8], context(x[:, :8]), state).state
        part(x[:, 8:], context(x[:, 8:], start=8), state)
        return list(taken)

    assert run(mla()) == ["expanded", "absorbed"]
    plain = mla()
    plain.kernels = "reference"
    assert run(plain) == ["expanded", "expanded"]

    class Doubling(Dense):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    other = mla()
    other.kv_b_proj.__class__ = Doubling
    assert run(other) == ["expanded", "expanded"]


@pytest.mark.parametrize("num_queries", [1, 2, 3, 5, 8, 12])
def test_the_choice_follows_the_products_counted(num_queries):
    part, x = mla(), stream(num_queries)
    queries, _ = part.project(x, context(x))
    _, latents = part.project(y := stream(12), context(y))
    counts = []
    for form in (part.absorbed, part.expanded):
        with FlopCounterMode(display=False) as counter:
            form(queries, latents, causal=False)
        counts.append(counter.get_total_flops())
    assert part._absorbs(num_queries, 12) == (counts[0] <= counts[1])


def test_the_state_holds_latents_and_the_shared_key_alone():
    sliding, whole = mla(sliding_window=8), mla()
    assert whole.state_bytes(1000, torch.float32) == 1000 * (10 + 4) * 4
    assert sliding.state_bytes(1000, torch.bfloat16) == 8 * (10 + 4) * 2
    state = sliding.init_state(2, 1000, device=CPU, dtype=torch.float64)
    pointers = [t.data_ptr() for t in tensors_of(state)]
    for t in range(20):
        x = stream(1)
        state = sliding(x, context(x, start=t), state).state
    assert [t.data_ptr() for t in tensors_of(state)] == pointers, "a step allocates no new state"


@pytest.mark.parametrize("q_lora_rank", [None, 7])
def test_counted_flops_are_those_of_an_encoder(q_lora_rank):
    """Where every pair is visible, what runs is what is counted."""
    part, x = mla(causal=False, q_lora_rank=q_lora_rank), stream(12)
    with FlopCounterMode(display=False) as counter:
        part(x, context(x, causal=False))
    assert counter.get_total_flops() == 2 * 12 * part.flops_per_token(12)


@pytest.mark.parametrize("window", [None, 5])
def test_counted_pairs_are_those_of_the_mask(window):
    part, T = mla(sliding_window=window), 12
    per_pair = 2 * 3 * (6 + 4 + 5)
    pairs = sum(min(t + 1, window or T) for t in range(T))
    difference = T * (part.flops_per_token(T) - mla(sliding_window=1).flops_per_token(T))
    assert difference == pytest.approx(per_pair * (pairs - T))


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "on_tables", "on_scores"),
    [
        (1.0, 0.0, 0.1 * math.log(4) + 1, 1.0),
        (0.7, 0.7, 1.0, (0.07 * math.log(4) + 1) ** 2),
        (1.0, 0.5, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1), (0.05 * math.log(4) + 1) ** 2),
        (0.0, 0.0, 1.0, 1.0),
    ],
)
def test_yarn_factors(mscale, mscale_all_dim, on_tables, on_scores):
    config = MLAConfig.model_validate(
        {"type": "mla", **SIZES, "position": YARN, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
    )
    assert attention_factor(config.built_position()) == pytest.approx(on_tables)
    assert config.scale() == pytest.approx(on_scores * 10**-0.5)


def test_a_given_attention_factor_is_kept():
    scaling = {**YARN["scaling"], "attention_factor": 1.5}
    config = MLAConfig.model_validate({"type": "mla", **SIZES, "position": {"type": "rope", "scaling": scaling}})
    assert attention_factor(config.built_position()) == 1.5


def test_interleaved_weights_are_an_order_of_channels():
    plain, interleaved, x = mla(), mla(rope_interleave=True), stream(7)
    order = torch.tensor([0, 2, 1, 3])  # halves (0, 1 | 2, 3) lie at 0, 2 and 1, 3
    weights = plain.state_dict()
    q = weights["q_proj.weight"].view(3, 10, 24).clone()
    q[:, 6:] = q[:, 6:][:, order]
    k = weights["kv_a_proj_with_mqa.weight"].clone()
    k[10:] = k[10:][order]
    interleaved.load_state_dict({**weights, "q_proj.weight": q.flatten(0, 1), "kv_a_proj_with_mqa.weight": k})
    torch.testing.assert_close(interleaved(x, context(x)).y, plain(x, context(x)).y)


def test_parameters_and_roles():
    roles = parameter_roles(mla(q_lora_rank=7))
    linears = {f"{n}.weight" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    norms = {"q_a_layernorm.weight", "kv_a_layernorm.weight"}
    assert roles == dict.fromkeys(linears, "attention") | dict.fromkeys(norms, "norm")
    assert "q_proj.weight" in parameter_roles(mla())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_rope_head_dim": 5}, "cannot be rotated in pairs"),
        ({"position": {"type": "rope", "partial_rotary_factor": 0.5}}, "all of qk_rope_head_dim is rotated"),
        ({"mscale": 0.7}, "do nothing without YaRN"),
        ({"mscale_all_dim": 0.7, "position": {"type": "rope"}}, "do nothing without YaRN"),
        (
            {"mscale": 0.7, "position": {**YARN, "scaling": {**YARN["scaling"], "attention_factor": 1.0}}},
            "both say what cos and sin are multiplied by",
        ),
    ],
)
def test_what_cannot_be_is_a_problem(fields, message):
    with pytest.raises(ValidationError, match=message):
        MLAConfig.model_validate({"type": "mla", **SIZES, **fields})


def test_ranks_that_compress_nothing_get_advice():
    assert [w for w in warnings(load_experiment(PRESET)) if "rank" in w] == []
    wide = load_experiment(PRESET, ["model.blocks.global.0.q_lora_rank=32", "model.overrides.0.mla.kv_lora_rank=48"])
    found = [w for w in warnings(wide) if "rank" in w or "latent" in w]
    assert [w.split(":")[0] for w in found] == ["model layer 0", "model.blocks.global.0.q_lora_rank"]
    assert "no less than half of the 96 channels" in found[0]
    assert "compress nothing of a stream of 32" in found[1]


@pytest.mark.parametrize(
    ("hidden_size", "q_lora_rank", "advised"),
    [(11, None, []), (10, None, ["kv_lora_rank"]), (99, 79, []), (99, 80, ["q_lora_rank"]), (79, 79, ["q_lora_rank"])],
)
def test_ranks_are_compared_with_what_they_stand_between(hidden_size, q_lora_rank, advised):
    """Latents of 10 for 88 channels of keys and values, queries of 80."""
    config = MLAConfig.model_validate({"type": "mla", **SIZES, "num_heads": 8, "q_lora_rank": q_lora_rank})
    assert [advice.path for advice in config.advice_in(hidden_size)] == [(name,) for name in advised]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("position", [HOPE, XPOS])
def test_channels_with_a_position_fade_with_distance_and_the_others_do_not(position, causal):
    part, x = mla(position=position, causal=causal), stream(9)
    queries, latents = part.project(x, context(x, causal=causal))
    k_nope, v = part.kv_b_proj(latents.c_BSR).unflatten(-1, (3, 11)).split([6, 5], dim=-1)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    fading = (-part.position.rates(0, CPU).double() * distance[..., None]).exp()
    scores = torch.einsum("btnh,bsnh->bnts", queries.nope_BTNH, k_nope)
    scores = scores + torch.einsum("btnh,bsh,tsh->bnts", queries.rope_BTNH, latents.rope_BSH, fading)
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    wanted = torch.einsum("bnts,bsnh->btnh", (scores / 10**0.5).softmax(-1), v)
    torch.testing.assert_close(part.expanded(queries, latents, causal=causal), wanted)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("position", "window"), [(HOPE, None), (HOPE, 5), (XPOS, None), (XPOS, 5)])
def test_fading_positions_hold_the_contracts(bidirectional, position, window):
    sizes = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    part = {"type": "mla", "num_heads": 2, **sizes, "sliding_window": window, "position": position}
    blocks = {"layer": [part, {"type": "mlp", "intermediate_size": 16}]}
    model = {"hidden_size": 16, "num_layers": 2, "norm": {"type": "rms_norm"}, "blocks": blocks}
    config = ModelConfig.model_validate({**model, "bidirectional": bidirectional})
    subject = Subject(config, CausalLMConfig())
    for contract in contracts_for(subject):
        contract(subject)


def test_positions_that_act_on_no_pairs_are_refused():
    with pytest.raises(ValidationError, match="alibi does not act on pairs of channels"):
        mla(position={"type": "alibi"})
