"""Every attention kernel against the plain definition, and the definition against closed forms and PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.ops import attention_banded
from graft.ops.attention import FOLDED_BELOW, SDPA_FROM, attention, choose_form
from graft.ops.attention_banded import banded_attention
from graft.ops.attention_folded import folded_attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.attention_reference import reference_attention
from largest_tensor import LargestTensor

FAST = {"folded": folded_attention, "banded": banded_attention}


def random_qkv(B=2, T=5, S=None, N=4, K=2, H=8, dtype=torch.float64, seed=0, v_head_dim=None) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, N, H), (B, S or T, K, H), (B, S or T, K, v_head_dim or H)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def values_and_gradients(kernel, qkv: list[Tensor], visibility: Visibility, scoring: Scoring) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in qkv]
    out = kernel(*inputs, visibility, scoring, dropout=0.0)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def packed_segments(B: int, S: int, seed: int) -> Tensor:
    """Padding of random length on the left, then documents of random lengths."""
    g = torch.Generator().manual_seed(seed)
    segments = (torch.rand(B, S, generator=g) < 0.2).cumsum(1) + 1
    pad = torch.randint(0, S + 1, (B, 1), generator=g)
    return torch.where(torch.arange(S) < pad, 0, segments)


@st.composite
def problems(draw):
    """Shapes, masks and score terms: blocks of 4 make small sequences as interesting as long ones."""
    K, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 1), (1, 8)]))
    T = draw(st.integers(1, 14))
    S = T + draw(st.integers(0, 9))
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, S + 2))
    seed = draw(st.integers(0, 99))
    segments = packed_segments(2, S, seed) if draw(st.booleans()) else None
    queries = None if segments is None else segments[:, S - T :]
    slopes = torch.linspace(0.1, 0.9, K * group) if draw(st.booleans()) else None
    scoring = Scoring(draw(st.sampled_from([0.3, 1.0])), draw(st.sampled_from([None, 2.0])), slopes)
    return (K, group, T, S, seed), Visibility(causal, window, S - T, queries, segments), scoring


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60)
@given(problem=problems(), v_head_dim=st.sampled_from([4, 4, 1, 7]))
def test_fast_kernels_equal_the_definition_in_values_and_gradients(name, problem, v_head_dim):
    (K, group, T, S, seed), visibility, scoring = problem
    qkv = random_qkv(T=T, S=S, N=K * group, K=K, H=4, seed=seed, v_head_dim=v_head_dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_banded, "BLOCK", 4)
        fast = values_and_gradients(FAST[name], qkv, visibility, scoring)
    plain = values_and_gradients(reference_attention, qkv, visibility, scoring)
    for a, b in zip(fast, plain, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("T", [1, 129, 300])
@pytest.mark.parametrize("window", [None, 50, 128, 200])
def test_fast_kernels_in_training_dtypes_at_the_real_block_size(name, dtype, tolerance, T, window):
    qkv = random_qkv(B=1, T=T, N=4, K=1, dtype=dtype)
    visibility, scoring = Visibility(True, window, 0), Scoring(8**-0.5)
    fast = values_and_gradients(FAST[name], qkv, visibility, scoring)
    plain = values_and_gradients(reference_attention, [x.double() for x in qkv], visibility, scoring)
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().clamp_min(1e-3)  # one key: the gradients of q and k are 0
        assert ((a.double() - b).abs().max() / scale) < tolerance


@pytest.mark.parametrize("name", FAST)
def test_whole_blocks_of_queries_may_be_beyond_every_key(name):
    qkv, visibility = random_qkv(B=1, T=300, S=20), Visibility(True, window=5)
    expected = values_and_gradients(reference_attention, qkv, visibility, Scoring(0.3))
    for a, b in zip(values_and_gradients(FAST[name], qkv, visibility, Scoring(0.3)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("v_head_dim", [8, 5])
def test_definition_equals_pytorch(v_head_dim):
    q, k, v = random_qkv(T=7, S=7, N=6, K=3, v_head_dim=v_head_dim)
    out = attention(q, k, v, Visibility(causal=True), Scoring(0.4), kernels="reference")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_closed_form_of_equal_scores():
    """All scores equal: a query averages the values it sees, and the window counts the query itself."""
    T, window = 6, 3
    q, k = torch.zeros(1, T, 1, 2), torch.zeros(1, T, 1, 2)
    v = torch.arange(T, dtype=torch.float32).view(1, T, 1, 1).expand(1, T, 1, 2)
    for kernels in ("auto", "reference"):
        out = attention(q, k, v, Visibility(True, window), Scoring(1.0), kernels=kernels)
        wanted = [sum(range(max(0, t - 2), t + 1)) / min(t + 1, window) for t in range(T)]
        torch.testing.assert_close(out[0, :, 0, 0], torch.tensor(wanted))
        both = attention(q, k, v, Visibility(False, window), Scoring(1.0), kernels=kernels)
        wanted = [sum(r) / len(r) for t in range(T) if (r := range(max(0, t - 2), min(T, t + 3)))]
        torch.testing.assert_close(both[0, :, 0, 0], torch.tensor(wanted))


def test_closed_form_of_distance_and_softcap():
    """Two keys: probabilities are a logistic function of the score difference."""
    q, k = torch.tensor([0.0, 3.0]).view(1, 2, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    v = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    out = attention(q, k, v, Visibility(causal=True), Scoring(0.5, 2.0, torch.tensor([0.7])))
    far, near = 2 * math.tanh(1.5 / 2) - 0.7, 2 * math.tanh(3.0 / 2)
    torch.testing.assert_close(out[0, 1, 0, 0].item(), 1 / (1 + math.exp(near - far)))


@pytest.mark.parametrize("kernel", [reference_attention, folded_attention, banded_attention])
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(kernel):
    qkv = random_qkv(B=1, T=4)
    segments = torch.zeros(1, 4, dtype=torch.int64)
    out, *gradients = values_and_gradients(kernel, qkv, Visibility(True, None, 0, segments, segments), Scoring(1.0))
    assert (out == 0).all()
    assert all((g == 0).all() for g in gradients)


def test_choice_of_form():
    def chosen(T, S=None, *, causal=True, window=None, segments=False, dtype=torch.float32, scoring=None, **kwargs):
        S = S or T
        q = torch.empty(1, T, 2, 4, device="meta", dtype=dtype)
        k = torch.empty(1, S, 1, 4, device="meta", dtype=dtype)
        ids = torch.ones(1, S, dtype=torch.int64) if segments else None
        visibility = Visibility(causal, window, S - T, None if ids is None else ids[:, :T], ids)
        return choose_form(q, k, visibility, scoring or Scoring(1.0), **kwargs)

    assert chosen(1, 5000) == "folded"
    assert chosen(FOLDED_BELOW - 1) == "folded"
    assert chosen(FOLDED_BELOW) == "banded"
    assert chosen(200, window=20) == "banded"
    assert chosen(100, window=20) == "folded"
    assert chosen(SDPA_FROM) == "sdpa"
    assert chosen(SDPA_FROM, dtype=torch.bfloat16) == "banded"
    assert chosen(SDPA_FROM, dropout=0.1) == "banded"
    assert chosen(SDPA_FROM, v_head_dim=4) == "sdpa"
    assert chosen(SDPA_FROM, v_head_dim=3) == "banded"
    assert chosen(SDPA_FROM, window=512) == "banded"
    assert chosen(SDPA_FROM, segments=True) == "banded"
    assert chosen(SDPA_FROM, scoring=Scoring(1.0, softcap=50.0)) == "banded"
    assert chosen(SDPA_FROM, 2 * SDPA_FROM) == "banded", "PyTorch aligns the triangle to the first key"
    assert chosen(SDPA_FROM, kernels="reference") == "reference"


@given(st.integers(1, 5), st.integers(1, 7), st.integers(-3, 9), st.integers(1, 12))
def test_a_window_is_idle_when_no_pair_is_so_far_apart(num_queries, num_keys, offset, window):
    away = (torch.arange(num_queries)[:, None] + offset - torch.arange(num_keys)).abs()
    left = Visibility(False, window, offset).without_idle_window(num_queries, num_keys).window
    assert left == (window if (away >= window).any() else None)


def test_every_choice_gives_the_same_numbers(monkeypatch):
    """The thresholds decide how, never what: with low ones, one small problem goes through each kernel."""
    from graft.ops import attention as module

    q, k, v = random_qkv(T=9, dtype=torch.float32)
    outs = []
    for folded_below, sdpa_from in ((99, 99), (1, 99), (1, 1)):
        monkeypatch.setattr(module, "FOLDED_BELOW", folded_below)
        monkeypatch.setattr(module, "SDPA_FROM", sdpa_from)
        outs.append(module.attention(q, k, v, Visibility(causal=True), Scoring(0.3)))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_blocks_make_no_square(monkeypatch):
    """Neither pass makes anything larger than its inputs or one block of scores."""
    monkeypatch.setattr(attention_banded, "BLOCK", 16)
    T, window = 1024, 33
    q, k, v = torch.randn(3, 1, T, 2)
    arguments = (q, k, v, 1, 1, True, window, 0, None, None, 1.0, None, None, None)
    with LargestTensor() as mode:  # the operators' own code: a mode does not see inside an operator
        out = attention_banded._banded._init_fn(*arguments)
        attention_banded._banded_backward._init_fn(out, *arguments)
    assert mode.size == max(T * 2, 16 * (16 + window - 1))


def test_with_dropout_blocks_keep_what_the_window_says(monkeypatch):
    monkeypatch.setattr(attention_banded, "BLOCK", 16)
    qkv = random_qkv(B=1, T=1024, N=1, K=1, H=2, dtype=torch.float32)
    with LargestTensor() as mode:
        attention(*qkv, Visibility(True, 33), Scoring(1.0), dropout=0.1).sum().backward()
    assert mode.size == max(1024 * 2, 16 * (16 + 33 - 1))


def test_the_window_decides_the_work(monkeypatch):
    """The scores a windowed pass computes, counted: linear in T, and what the window and the block size say."""
    monkeypatch.setattr(attention_banded, "BLOCK", 16)
    counted = []
    original = attention_banded._capped_scores
    monkeypatch.setattr(attention_banded, "_capped_scores", lambda *a: counted.append((s := original(*a)).numel()) or s)
    T, window = 640, 33
    q, k, v = random_qkv(B=1, T=T, N=1, K=1, dtype=torch.float32)
    attention(q, k, v, Visibility(True, window), Scoring(1.0)).sum().backward()
    one_pass = sum(16 * (b - max(0, b - 16 - window + 1)) for b in range(16, T + 1, 16))
    assert sum(counted) == 2 * one_pass, "forward, and once more in the backward pass"
    assert max(counted) == 16 * (16 + window - 1)


@pytest.mark.parametrize("v_head_dim", [8, 5])
def test_the_flop_counter_sees_what_blocks_compute(v_head_dim):
    q, k, v = random_qkv(B=3, T=1000, N=4, K=2, H=8, dtype=torch.float32, v_head_dim=v_head_dim)
    block, T, window = attention_banded.BLOCK, 1000, 200
    ends = [*range(block, T, block), T]
    pairs = sum((e - s) * (e - max(0, s - window + 1)) for s, e in zip(range(0, T, block), ends, strict=True))
    with FlopCounterMode(display=False) as forward:
        out = attention(q, k, v, Visibility(True, window), Scoring(1.0))
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 4 * (8 + v_head_dim) * pairs
    assert backward.get_total_flops() == 2 * 3 * 4 * (3 * 8 + 2 * v_head_dim) * pairs


@pytest.mark.parametrize("T", [40, 600])
def test_dropout_drops_the_said_share_and_keeps_the_mean(T):
    """Values are one: an output is the sum of kept probabilities, mean 1 and variance rate / (1 - rate) / keys."""
    q, k, v = torch.zeros(1, T, 8, 2), torch.zeros(1, T, 8, 2), torch.ones(1, T, 8, 2)
    for kernels in ("auto", "reference"):
        out = attention(q, k, v, Visibility(causal=False), Scoring(1.0), dropout=0.25, kernels=kernels)[..., 0]
        assert abs(out.mean() - 1) < 0.02
        assert abs(out.var() * T / (0.25 / 0.75) - 1) < 0.3
        kept = out * T * 0.75  # a whole number of keys
        torch.testing.assert_close(kept, kept.round(), atol=1e-2, rtol=0)
    torch.testing.assert_close(attention(q, k, v, Visibility(causal=False), Scoring(1.0), dropout=0.0), v)


def test_autocast_runs_matrix_products_in_bf16():
    q, k, v = random_qkv(T=6, dtype=torch.float32)
    plain = attention(q, k, v, Visibility(causal=True), Scoring(0.3), kernels="reference")
    for kernels in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k, v, Visibility(causal=True), Scoring(0.3), kernels=kernels)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), plain, atol=3e-2, rtol=0)


def test_gradcheck_of_the_handwritten_backward(monkeypatch):
    monkeypatch.setattr(attention_banded, "BLOCK", 3)
    q, k, v = random_qkv(B=1, T=5, N=2, K=1, H=2)
    visibility, scoring = Visibility(True, 4, 0), Scoring(0.7, 1.5, torch.tensor([0.2, 0.4]))
    assert torch.autograd.gradcheck(lambda *x: banded_attention(*x, visibility, scoring, dropout=0.0), (q, k, v))


def test_the_operator_keeps_its_promises_to_the_compiler(monkeypatch):
    monkeypatch.setattr(attention_banded, "BLOCK", 4)
    q, k, v = random_qkv(B=1, T=9, N=2, K=1, H=2, dtype=torch.float32)
    folded = [x.detach().transpose(1, 2).reshape(1, -1, 2).requires_grad_() for x in (q, k, v)]
    folded[0] = q.detach().reshape(1, 18, 2).requires_grad_()
    arguments = (*folded, 1, 2, True, 3, 0, None, None, 0.5, None, None, None)
    torch.library.opcheck(attention_banded._banded, arguments)


@pytest.mark.parametrize("T", [20, 600])
def test_meta_tensors_pass_through(T):
    q, k, v = (x.detach().to("meta").requires_grad_() for x in random_qkv(T=T))
    out = attention(q, k, v, Visibility(True, 7), Scoring(1.0))
    out.sum().backward()
    assert out.shape == q.shape
    assert q.grad is not None
    assert q.grad.device.type == "meta"
