"""The sigmoid attention part: the formula from weights to output, its state, its cost, its learned bias."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from graft.config.model import InitConfig
from graft.config.roles import MATRIX_ROLES, NO_DECAY
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.ops.attention_mask import Visibility
from graft.part import Context, Site, parameter_roles
from graft.token_mixers.attention_config import AttentionConfig
from graft.token_mixers.heads import MultiHead
from graft.token_mixers.sigmoid_attention import SigmoidAttention
from graft.token_mixers.sigmoid_attention_config import SigmoidAttentionConfig
from graft.token_mixers.value_residual import VALUE_RESIDUAL

CPU = torch.device("cpu")
NONE = {"type": "none"}


def built(config, *, causal=True) -> MultiHead:
    site = Site(24, 1, 2, 4, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3))
    part = config.build(site)
    initialize(part, seed=1)
    return part


def sigmoid_part(*, causal=True, **fields) -> SigmoidAttention:
    fields = {"num_heads": 4, "num_kv_heads": 2, "position": NONE, **fields}
    part = built(SigmoidAttentionConfig.model_validate(fields), causal=causal)
    assert isinstance(part, SigmoidAttention)
    return part


def context(B, T, *, start=0, segments=None, positions=None, causal=True, **fields) -> Context:
    if positions is None:
        positions = torch.arange(start, start + T).expand(B, T)
    return Context(torch.zeros(B, T, dtype=torch.int64), positions, segments, causal, **fields)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("fields", "bias", "normalize"),
    [({}, "auto", False), ({"bias": -0.5}, -0.5, False), ({"bias": 0, "normalize": True}, 0.0, True)],
)
def test_layer_is_the_formula_in_values_and_gradients(kernels, causal, fields, bias, normalize):
    """From the weights by name, head by head: nothing of the part's own code."""
    T, H = 150, 6
    part = sigmoid_part(causal=causal, learned_bias=True, **fields).double()
    part.kernels = kernels
    with torch.no_grad():
        part.head_bias.copy_(torch.tensor([0.0, 0.5, -1.0, 2.0]))
    x = torch.randn(1, T, 24, dtype=torch.float64, requires_grad=True)
    found = part(x, context(1, T, causal=causal)).y

    named = dict(part.named_parameters())
    seen = torch.ones(T, T, dtype=torch.float64).tril() if causal else torch.ones(T, T, dtype=torch.float64)
    b = -seen.sum(-1, keepdim=True).log() if bias == "auto" else bias
    heads = []
    for n in range(4):
        rows, kv_rows = slice(n * H, (n + 1) * H), slice(n // 2 * H, (n // 2 + 1) * H)
        q = x[0] @ named["q_proj.weight"][rows].T
        k = x[0] @ named["k_proj.weight"][kv_rows].T
        v = x[0] @ named["v_proj.weight"][kv_rows].T
        p = seen / (1 + torch.exp(-(q @ k.T / math.sqrt(H) + b + named["head_bias"][n])))
        heads.append((p / (p.sum(-1, keepdim=True) + 1e-6) if normalize else p) @ v)
    wanted = torch.cat(heads, dim=-1) @ named["o_proj.weight"].T
    torch.testing.assert_close(found[0], wanted)
    leaves = [x, *named.values()]
    loss = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    ours, theirs = (torch.autograd.grad((y * loss).sum(), leaves) for y in (found, wanted[None]))
    for a, c in zip(ours, theirs, strict=True):
        assert a.any()
        torch.testing.assert_close(a, c)


def splits(total: int):
    """Lists of positive sizes that add up to ``total``."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda c: [b - a for a, b in zip([0, *sorted(c)], [*sorted(c), total], strict=True)])


@settings(max_examples=60)
@given(
    chunks=splits(17),
    window=st.sampled_from([None, 1, 2, 5, 16, 17, 40]),
    position=st.sampled_from(["rope", "hope", "alibi", "none"]),
    normalize=st.booleans(),
    left_pad=st.none() | st.integers(0, 16),
)
def test_decoding_in_any_chunks_equals_the_full_forward(chunks, window, position, normalize, left_pad):
    """Also with a left-padded row beside a full one: the bias counts the keys that are seen, padding is none."""
    fields = {"sliding_window": window, "position": {"type": position}, "normalize": normalize}
    part = sigmoid_part(**fields, qk_norm={"type": "rms_norm"}).double()
    x, segments, positions = torch.randn(2, 17, 24, dtype=torch.float64), None, None
    if left_pad is not None:
        index = torch.arange(17).expand(2, 17)
        real = torch.stack((index[0] >= left_pad, index[1] >= 0))
        segments, positions = real.long(), (index - torch.tensor([[left_pad], [0]])).clamp_min(0)
    with torch.no_grad():
        full = part(x, context(2, 17, segments=segments, positions=positions)).y
        state, pieces, start = part.init_state(2, 17, device=CPU, dtype=x.dtype), [], 0
        for size in chunks:
            now = slice(start, start + size)
            given_ids = None if segments is None else segments[:, now]
            given_positions = None if positions is None else positions[:, now]
            ctx = context(2, size, start=start, segments=given_ids, positions=given_positions)
            out = part(x[:, now], ctx, state)
            pieces.append(out.y)
            state, start = out.state, start + size
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-6, atol=1e-8)  # hope's rates are fp32


@pytest.mark.parametrize("T", [20, 150])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("position", ["rope", "hope"])
def test_packed_documents_are_as_alone(T, window, position):
    part = sigmoid_part(sliding_window=window, position={"type": position})
    x, cut = torch.randn(1, T, 24), T // 3
    segments = torch.where(torch.arange(T) >= cut, 4, 9)[None]
    positions = torch.cat((torch.arange(cut), torch.arange(T - cut)))[None]
    packed = part(x, context(1, T, segments=segments, positions=positions)).y
    torch.testing.assert_close(packed[:, :cut], part(x[:, :cut], context(1, cut)).y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, cut:], part(x[:, cut:], context(1, T - cut)).y, rtol=1e-4, atol=1e-5)


def test_an_encoder_sees_both_sides_as_far_as_its_window():
    part = sigmoid_part(causal=False, sliding_window=3)
    x = torch.randn(1, 9, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(part(x, context(1, 9, causal=False)).y[0, 4].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [2 <= s <= 6 for s in range(9)]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("position", ["none", "hope"])
def test_counted_flops_are_those_of_decoding(window, position):
    part, T = sigmoid_part(sliding_window=window, position={"type": position}), 20
    state = part.init_state(1, T, device=CPU, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for t in range(T):
            state = part(torch.randn(1, 1, 24), context(1, 1, start=t), state).state
    assert counter.get_total_flops() == T * part.flops_per_token(T)


def test_state_is_that_of_attention():
    ours = sigmoid_part(sliding_window=8)
    softmax = built(AttentionConfig(num_heads=4, num_kv_heads=2, sliding_window=8, position=ours.config.position))
    for length in (5, 1000):
        assert ours.state_bytes(length, torch.bfloat16) == softmax.state_bytes(length, torch.bfloat16)


def test_learned_bias_is_a_scalar_per_head_that_starts_at_zero():
    part = sigmoid_part(learned_bias=True)
    assert part.head_bias.tolist() == [0.0] * 4
    role = parameter_roles(part)["head_bias"]
    assert role in NO_DECAY
    assert role not in MATRIX_ROLES
    assert "head_bias" not in dict(sigmoid_part().named_parameters())


def test_values_of_the_first_layer_are_shared_with_softmax_attention():
    part, plain = sigmoid_part(value_residual=True), sigmoid_part()
    x, first = torch.randn(1, 5, 24), torch.randn(1, 5, 2, 6)
    q, k, v = plain.project(x, context(1, 5))
    wanted = plain.o_proj(plain.attend(q, k, (v + first) / 2, Visibility(causal=True)).flatten(-2))
    torch.testing.assert_close(part(x, context(1, 5, published={VALUE_RESIDUAL: first})).y, wanted)


def test_a_bias_that_is_no_number_is_an_error():
    with pytest.raises(ValidationError):
        SigmoidAttentionConfig.model_validate({"num_heads": 2, "position": NONE, "bias": "log"})
