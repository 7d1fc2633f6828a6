"""The attention part: its state, its order of operations, its cost, and the layers of transformers as oracle."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from graft.config.model import InitConfig
from graft.errors import ConfigError
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.ops import attention_banded
from graft.ops.attention_mask import Visibility
from graft.part import Context, PartOutput, Site, parameter_roles, tensors_of
from graft.positions.base import TablePosition
from graft.token_mixers.attention import Attention
from graft.token_mixers.attention_config import AttentionConfig
from graft.token_mixers.heads import visible_pairs
from graft.token_mixers.value_residual import VALUE_RESIDUAL

CPU = torch.device("cpu")
ROPE = {"type": "rope"}


def site(hidden_size=24, *, causal=True, layer_idx=0) -> Site:
    return Site(hidden_size, layer_idx, 2, 4, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3))


def attention_part(*, causal=True, layer_idx=0, **fields) -> Attention:
    fields = {"num_heads": 4, "num_kv_heads": 2, "position": ROPE, **fields}
    config = AttentionConfig.model_validate({"type": "attention", **fields})
    part = config.build(site(causal=causal, layer_idx=layer_idx))
    initialize(part, seed=1)
    return part


def context(B, T, *, start=0, segments=None, positions=None, causal=True, **fields) -> Context:
    if positions is None:
        positions = torch.arange(start, start + T).expand(B, T)
    return Context(torch.zeros(B, T, dtype=torch.int64), positions, segments, causal, **fields)


def decoded(part: Attention, x, chunks: list[int], *, segments=None, positions=None) -> torch.Tensor:
    state = part.init_state(x.shape[0], x.shape[1], device=CPU, dtype=x.dtype)
    pieces, start = [], 0
    for size in chunks:
        now = slice(start, start + size)
        ctx = context(
            x.shape[0],
            size,
            start=start,
            segments=None if segments is None else segments[:, now],
            positions=None if positions is None else positions[:, now],
        )
        out = part(x[:, now], ctx, state)
        pieces.append(out.y)
        state, start = out.state, start + size
    return torch.cat(pieces, dim=1)


def splits(total: int):
    """Lists of positive sizes that add up to ``total``."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda c: [b - a for a, b in zip([0, *sorted(c)], [*sorted(c), total], strict=True)])


@settings(max_examples=60)
@given(
    chunks=splits(17),
    window=st.sampled_from([None, 1, 2, 5, 16, 17, 40]),
    position=st.sampled_from([ROPE, {"type": "alibi"}, {"type": "none"}]),
    left_pad=st.none() | st.integers(0, 16),
)
def test_decoding_in_any_chunks_equals_the_full_forward(chunks, window, position, left_pad):
    """Also with a left-padded row beside a full one, whose positions count from its first real token."""
    part = attention_part(sliding_window=window, position=position, qk_norm={"type": "rms_norm"}).double()
    x, segments, positions = torch.randn(2, 17, 24, dtype=torch.float64), None, None
    if left_pad is not None:
        index = torch.arange(17).expand(2, 17)
        real = torch.stack((index[0] >= left_pad, index[1] >= 0))
        segments, positions = real.long(), (index - torch.tensor([[left_pad], [0]])).clamp_min(0)
    with torch.no_grad():
        full = part(x, context(2, 17, segments=segments, positions=positions)).y
        pieces = decoded(part, x, chunks, segments=segments, positions=positions)
    torch.testing.assert_close(pieces, full, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [None, 4])
def test_padding_on_the_left_changes_nothing(window):
    part = attention_part(sliding_window=window)
    x = torch.randn(1, 9, 24)
    padded = torch.cat((torch.randn(1, 3, 24), x), dim=1)
    segments = torch.tensor([[0] * 3 + [1] * 9])
    positions = (torch.arange(12) - 3).clamp_min(0)[None]
    alone = part(x, context(1, 9)).y
    torch.testing.assert_close(part(padded, context(1, 12, segments=segments, positions=positions)).y[:, 3:], alone)
    stepwise = decoded(part, padded, [5] + [1] * 7, segments=segments, positions=positions)
    torch.testing.assert_close(stepwise[:, 3:], alone)


@pytest.mark.parametrize("steps", [(4, 5, 6), (4, 6)])
def test_steps_without_segments_after_padded_ones_continue_document_1(steps):
    part = attention_part(sliding_window=4)
    x, segments = torch.randn(1, 6, 24), torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3]])
    with_all = decoded(part, x, [4, 1, 1], segments=segments, positions=positions)
    state = part.init_state(1, 6, device=CPU, dtype=x.dtype)
    out = part(x[:, :4], context(1, 4, segments=segments[:, :4], positions=positions[:, :4]), state)
    outs = [out.y]
    for start, end in itertools.pairwise(steps):
        out = part(x[:, start:end], context(1, end - start, positions=positions[:, start:end]), out.state)
        outs.append(out.y)
    torch.testing.assert_close(torch.cat(outs, dim=1), with_all)


@pytest.mark.parametrize("window", [None, 4])
def test_segments_may_start_late_and_what_came_before_was_document_1(window):
    part = attention_part(sliding_window=window)
    x, segments = torch.randn(1, 7, 24), torch.tensor([[1, 1, 1, 1, 1, 2, 2]])
    full = part(x, context(1, 7, segments=segments)).y
    state, outs = part.init_state(1, 7, device=CPU, dtype=x.dtype), []
    for now, given_ids in ((slice(0, 3), None), (slice(3, 4), segments[:, 3:4]), (slice(4, 7), segments[:, 4:])):
        out = part(x[:, now], context(1, now.stop - now.start, start=now.start, segments=given_ids), state)
        state = out.state
        outs.append(out.y)
    torch.testing.assert_close(torch.cat(outs, dim=1), full)


def test_a_sliding_state_costs_its_window_and_a_global_one_the_length():
    sliding, whole = attention_part(sliding_window=8), attention_part()
    per_position = 2 * 2 * 6 * 4  # k and v, 2 heads of 6 channels, 4 bytes
    assert sliding.state_bytes(1000, torch.float32) == 8 * per_position
    assert sliding.state_bytes(5, torch.float32) == 5 * per_position
    assert whole.state_bytes(1000, torch.float32) == 1000 * per_position
    assert whole.state_bytes(1000, torch.bfloat16) == 1000 * per_position // 2
    state = sliding.init_state(3, 1000, device=CPU, dtype=torch.float32)
    pointers = [t.data_ptr() for t in tensors_of(state)]
    for t in range(20):
        state = sliding(torch.randn(3, 1, 24), context(3, 1, start=t), state).state
    assert [t.data_ptr() for t in tensors_of(state)] == pointers, "a step allocates no new state"
    assert state.length == 20


def test_more_positions_than_the_state_holds_is_refused():
    part = attention_part()
    state = part.init_state(1, 4, device=CPU, dtype=torch.float32)
    with pytest.raises(AssertionError, match="do not fit"):
        part(torch.randn(1, 5, 24), context(1, 5), state)


@pytest.mark.parametrize("T", [9, 150])
@pytest.mark.parametrize("window", [None, 3])
def test_only_the_past_within_the_window_gets_a_gradient(T, window):
    part = attention_part(sliding_window=window)
    x = torch.randn(1, T, 24, requires_grad=True)
    t = T - 4
    (gradient,) = torch.autograd.grad(part(x, context(1, T)).y[0, t].sum(), x)
    reached = gradient[0].abs().sum(-1) > 0
    first = 0 if window is None else t - window + 1
    assert reached.tolist() == [first <= s <= t for s in range(T)]


def test_an_encoder_sees_both_sides():
    part = attention_part(causal=False, sliding_window=3)
    x = torch.randn(1, 9, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(part(x, context(1, 9, causal=False)).y[0, 4].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [2 <= s <= 6 for s in range(9)]


@pytest.mark.parametrize("T", [20, 150])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("position", [ROPE, {"type": "alibi"}])
def test_packed_documents_do_not_see_each_other(T, window, position):
    part = attention_part(sliding_window=window, position=position)
    x, cut = torch.randn(1, T, 24), T // 3
    segments = (torch.arange(T) >= cut).long()[None] + 1
    positions = torch.cat((torch.arange(cut), torch.arange(T - cut)))[None]
    packed = part(x, context(1, T, segments=segments, positions=positions)).y
    torch.testing.assert_close(packed[:, :cut], part(x[:, :cut], context(1, cut)).y)
    torch.testing.assert_close(packed[:, cut:], part(x[:, cut:], context(1, T - cut)).y)


def test_reference_kernels_give_the_same_layer():
    part = attention_part(sliding_window=30, logit_softcap=5.0, position={"type": "alibi"})
    x = torch.randn(2, 140, 24)
    fast = part(x, context(2, 140)).y
    part.kernels = "reference"
    torch.testing.assert_close(part(x, context(2, 140)).y, fast, rtol=1e-4, atol=1e-5)


class TestValueResidual:
    def test_first_layer_publishes_and_starts_as_plain_attention(self):
        part, plain = attention_part(value_residual=True), attention_part()
        x = torch.randn(2, 5, 24)
        out = part(x, context(2, 5))
        assert out.published[VALUE_RESIDUAL].shape == (2, 5, 2, 6)
        torch.testing.assert_close(out.y, plain(x, context(2, 5)).y)

    def test_later_layers_mix_by_their_two_weights(self):
        part = attention_part(value_residual=True, layer_idx=1)
        plain = attention_part(layer_idx=1)
        x, first = torch.randn(2, 5, 24), torch.randn(2, 5, 2, 6)
        with torch.no_grad():
            part.value_residual.own.fill_(0.25)
            part.value_residual.first.fill_(2.0)
        out = part(x, context(2, 5, published={VALUE_RESIDUAL: first}))
        assert VALUE_RESIDUAL not in out.published
        v = 0.25 * plain.v_proj(x).view(2, 5, 2, 6) + 2.0 * first
        q, k, _ = plain.project(x, context(2, 5))
        wanted = plain.o_proj(plain.attend(q, k, v, Visibility(causal=True)).flatten(-2))
        torch.testing.assert_close(out.y, wanted)

    def test_decoding_mixes_before_it_remembers(self):
        part = attention_part(value_residual=True, layer_idx=1, sliding_window=3)
        x, first = torch.randn(1, 6, 24), torch.randn(1, 6, 2, 6)
        full = part(x, context(1, 6, published={VALUE_RESIDUAL: first})).y
        state, outs = part.init_state(1, 6, device=CPU, dtype=torch.float32), []
        for t in range(6):
            ctx = context(1, 1, start=t, published={VALUE_RESIDUAL: first[:, t : t + 1]})
            out: PartOutput = part(x[:, t : t + 1], ctx, state)
            state = out.state
            outs.append(out.y)
        torch.testing.assert_close(torch.cat(outs, dim=1), full)

    def test_weights_are_scalars_and_learn(self):
        part = attention_part(value_residual=True)
        part(torch.randn(1, 4, 24), context(1, 4)).y.sum().backward()
        roles = parameter_roles(part)
        assert {roles[f"value_residual.{n}"] for n in ("own", "first")} == {"scalar"}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.value_residual.parameters())


def test_dropout_acts_in_training_only():
    part, plain = attention_part(dropout=0.5), attention_part()
    x = torch.randn(1, 8, 24)
    assert not torch.equal(part(x, context(1, 8)).y, part(x, context(1, 8)).y)
    part.eval()
    assert torch.equal(part(x, context(1, 8)).y, plain(x, context(1, 8)).y)


def test_biases_are_where_asked_for_and_roles_are_complete():
    part = attention_part(qkv_bias=True, qk_norm={"type": "rms_norm"})
    named = {n for n, _ in part.named_parameters()}
    assert named == {f"{p}_proj.weight" for p in "qkvo"} | {f"{p}_proj.bias" for p in "qkv"} | {
        "q_norm.weight",
        "k_norm.weight",
    }
    roles = parameter_roles(part)
    assert roles["q_proj.weight"] == "attention"
    assert roles["k_proj.bias"] == "bias"
    assert "o_proj.bias" in dict(attention_part(output_bias=True).named_parameters())


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ConfigError, match="does not divide"):
        attention_part(num_heads=5, num_kv_heads=5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 20])
def test_visible_pairs_are_those_of_the_mask(causal, window):
    T = 9
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = (j <= i) if causal else torch.ones(T, T, dtype=torch.bool)
    if window is not None:
        seen = seen & ((i - j).abs() < window)
    assert visible_pairs(T, window, causal=causal) == seen.sum()


@pytest.mark.parametrize("window", [None, 6])
def test_counted_flops_are_those_of_decoding(window):
    part, T = attention_part(sliding_window=window), 20
    state = part.init_state(1, T, device=CPU, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        for t in range(T):
            state = part(torch.randn(1, 1, 24), context(1, 1, start=t), state).state
    assert counter.get_total_flops() == T * part.flops_per_token(T)


def hidden_states_and_rotation(part: Attention, T: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Random input, and the position tables in the form transformers' layers take."""
    assert isinstance(part.position, TablePosition)
    tables = part.position.tables(torch.arange(T)[None])
    return torch.randn(2, T, 24), tuple(torch.cat((t, t), dim=-1)[:, :, 0] for t in tables)


def causal_mask(T: int, window: int | None) -> torch.Tensor:
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = (j <= i) & (i - j < (window or T))
    return torch.zeros(T, T).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}
GEMMA = {"query_pre_attn_scalar": 13, "sliding_window": 5, "layer_types": ["sliding_attention"]}
ORACLES = {
    "llama": (LlamaAttention, LlamaConfig(**SIZES), {}),
    "qwen3": (
        Qwen3Attention,
        Qwen3Config(**SIZES, rms_norm_eps=1e-6),
        {"qk_norm": {"type": "rms_norm", "eps": 1e-6}},
    ),
    "gemma2": (
        Gemma2Attention,
        Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0),
        {"query_pre_attn_scalar": 13, "sliding_window": 5, "logit_softcap": 2.0},
    ),
    "gemma3": (
        Gemma3Attention,
        Gemma3TextConfig(**SIZES, **GEMMA, rms_norm_eps=1e-6),
        {
            "query_pre_attn_scalar": 13,
            "sliding_window": 5,
            "qk_norm": {"type": "rms_norm", "eps": 1e-6, "unit_offset": True},
        },
    ),
}
"""Name -> (transformers' layer, its config, our fields)."""


@pytest.mark.parametrize("T", [7, 140])
@pytest.mark.parametrize("kind", ORACLES)
def test_layers_of_transformers_give_the_same_numbers(kind, T):
    layer, config, fields = ORACLES[kind]
    part = attention_part(head_dim=10, position={"type": "rope", "theta": 5000.0}, **fields)
    norms = {n: torch.rand_like(p) + 0.5 for n, p in part.named_parameters() if "norm" in n}
    part.load_state_dict(norms, strict=False)
    theirs = layer(config, 0).eval()
    theirs.load_state_dict(part.state_dict())
    x, rotation = hidden_states_and_rotation(part, T)
    mask = causal_mask(T, part.sliding_window)
    wanted = theirs(x, position_embeddings=rotation, attention_mask=mask)[0]
    torch.testing.assert_close(part(x, context(2, T)).y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [20, 150])
def test_checkpointing_and_compiling_change_nothing(T, compiling, monkeypatch):
    monkeypatch.setattr(attention_banded, "BLOCK", 64)
    part = attention_part(sliding_window=9, qk_norm={"type": "rms_norm"})
    x = torch.randn(2, T, 24, requires_grad=True)

    def gradients(run):
        part.zero_grad()
        y = run(x)
        (g,) = torch.autograd.grad(y.square().sum(), x)
        return y, g

    ctx = context(2, T)

    def forward(x):
        return part(x, ctx).y

    plain = gradients(forward)
    checkpointed = gradients(lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False))
    counter = CompileCounterWithBackend("aot_eager")
    compiled_forward = torch.compile(forward, backend=counter, fullgraph=True)
    compiled = gradients(compiled_forward)
    compiled_forward(x + 1)
    assert counter.frame_count == 1, "one graph, compiled once"
    for other in (checkpointed, compiled):
        for a, b in zip(other, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # compiled projections are one product


def test_meta_forward_and_state():
    part = attention_part(sliding_window=9).to("meta")
    ctx = context(2, 150)
    ctx = dataclasses.replace(ctx, token_ids_BT=ctx.token_ids_BT.to("meta"), positions_BT=ctx.positions_BT.to("meta"))
    assert part(torch.empty(2, 150, 24, device="meta"), ctx).y.shape == (2, 150, 24)
    state = part.init_state(2, 20, device=torch.device("meta"), dtype=torch.bfloat16)
    assert {t.device.type for t in tensors_of(state)} == {"meta"}
