"""Sigmoid attention's kernels against its definition, and the definition against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.ops import attention_banded, decayed_products, sigmoid_attention_reference
from graft.ops import sigmoid_attention as module
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.sigmoid_attention import sigmoid_attention
from graft.ops.sigmoid_attention_reference import Weighing
from largest_tensor import LargestTensor

RATES = torch.tensor([2.0, 0.1, 0.01])
SLOPES = torch.linspace(0.1, 0.9, 4)
HEAD_BIAS = torch.linspace(-0.5, 1.0, 4, dtype=torch.float64)
PLAIN = Scoring(0.6)


def inputs(T, S=None, *, B=2, N=4, K=2, H=3, V=5, dtype=torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    shapes = [(B, T, N, H), (B, S or T, K, H), (B, S or T, K, V)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def values_and_gradients(
    qkv, visibility, bias, normalize, *, scoring=PLAIN, head_bias=HEAD_BIAS, kernels="auto"
) -> list[Tensor]:
    """Output and gradients of q, k, v and of the heads' bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (*qkv, head_bias)]
    weighing = Weighing(bias, leaves[3], normalize)
    out = sigmoid_attention(*leaves[:3], visibility, scoring, weighing, kernels=kernels)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("bias", [None, -1.5])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_every_kernel_is_the_formula(bias, normalize, causal):
    """Loops over queries, heads and keys, with the mask as a condition: documents of 1, 5 and 3, padding, a window."""
    segments, window = [0, 0, 7, 3, 3, 3, 3, 3, 4, 4, 4], 3
    q, k, v = inputs(11, B=1)
    wanted = torch.zeros(11, 4, 5, dtype=torch.float64)
    for t in range(11):
        for n in range(4):
            seen = [
                s
                for s in range(11)
                if segments[s] == segments[t] != 0 and abs(t - s) < window and (s <= t or not causal)
            ]
            b = -math.log(len(seen)) if bias is None and seen else bias or 0.0
            for s in seen:
                product = (q[0, t, n] * k[0, s, n // 2] * torch.exp(-RATES.double() * abs(t - s))).sum()
                score = 0.6 * product - SLOPES[n].double() * abs(t - s) + b + HEAD_BIAS[n]
                wanted[t, n] += torch.sigmoid(score) * v[0, s, n // 2]
            if normalize and seen:
                scores = [
                    0.6 * (q[0, t, n] * k[0, s, n // 2] * torch.exp(-RATES.double() * abs(t - s))).sum()
                    - SLOPES[n].double() * abs(t - s)
                    for s in seen
                ]
                wanted[t, n] /= torch.sigmoid(torch.stack(scores) + b + HEAD_BIAS[n]).sum() + 1e-6
    ids = torch.tensor([segments])
    visibility, scoring = Visibility(causal, window, 0, ids, ids), Scoring(0.6, slopes_N=SLOPES, rates_H=RATES)
    asked = (visibility, scoring, Weighing(bias, HEAD_BIAS, normalize))
    for kernels in ("auto", "reference"):
        torch.testing.assert_close(sigmoid_attention(q, k, v, *asked, kernels=kernels)[0], wanted)


@st.composite
def problems(draw):
    T = draw(st.integers(1, 14))
    S = T + draw(st.integers(0, 9))
    segments = None
    if draw(st.booleans()):
        cuts = torch.rand(2, S, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.2
        segments = torch.where(torch.arange(S) < draw(st.integers(0, S)), 0, cuts.cumsum(1) + 1)
    queries = None if segments is None else segments[:, S - T :]
    visibility = Visibility(draw(st.booleans()), draw(st.none() | st.integers(1, S + 2)), S - T, queries, segments)
    scoring = Scoring(0.6, None, draw(st.sampled_from([None, SLOPES])), draw(st.sampled_from([None, RATES])))
    return (T, S), visibility, scoring, (draw(st.sampled_from([None, -1.0])), draw(st.booleans()))


@pytest.mark.parametrize("kernel", ["folded", "banded"])
@settings(max_examples=30)
@given(problem=problems())
def test_fast_kernels_equal_the_definition_in_values_and_gradients(kernel, problem):
    (T, S), visibility, scoring, weighing = problem
    qkv = inputs(T, S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decayed_products, "NEAR", 2)
        patch.setattr(module, "BLOCK", 4 if kernel == "banded" else 10**6)
        patch.setattr(module, "FOLDED_BELOW", 1 if kernel == "banded" else 10**6)
        fast = values_and_gradients(qkv, visibility, *weighing, scoring=scoring)
    plain = values_and_gradients(qkv, visibility, *weighing, scoring=scoring, kernels="reference")
    for a, b in zip(fast, plain, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("T", [129, 541])
@pytest.mark.parametrize("normalize", [False, True])
def test_training_dtypes_at_the_real_block_size(dtype, tolerance, T, normalize):
    qkv = inputs(T, B=1, dtype=dtype)
    visibility = Visibility(True, 100)
    fast = values_and_gradients(qkv, visibility, None, normalize, head_bias=HEAD_BIAS.float())
    plain = values_and_gradients([x.double() for x in qkv], visibility, None, normalize, kernels="reference")
    for a, b in zip(fast[:4], plain[:4], strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs().max() / b.abs().max()) < tolerance
    assert fast[4].dtype == torch.float32
    torch.testing.assert_close(fast[4].double(), plain[4], rtol=tolerance, atol=tolerance * plain[4].abs().max())


def test_weights_of_equal_keys_add_up_to_what_the_bias_says():
    """Scores are 0: n keys of weight σ(−log n) = 1/(1 + n) each, or shares of 1 when normalised."""
    q, k, v = torch.zeros(1, 9, 1, 2), torch.zeros(1, 9, 1, 2), torch.ones(1, 9, 1, 1)
    seen = torch.tensor([1.0, 2, 3, 4, 4, 4, 4, 4, 4])
    for kernels in ("auto", "reference"):
        asked = (Visibility(True, 4), Scoring(1.0))
        plain = sigmoid_attention(q, k, v, *asked, Weighing(), kernels=kernels)
        torch.testing.assert_close(plain.flatten(), seen / (1 + seen))
        total = sigmoid_attention(q, k, v, *asked, Weighing(bias=0.0, normalize=True), kernels=kernels)
        half = seen / 2
        torch.testing.assert_close(total.flatten(), half / (half + sigmoid_attention_reference.NORMALIZER_EPS))


def test_autocast_multiplies_in_bf16():
    qkv = inputs(6, dtype=torch.float32)
    asked = (Visibility(causal=True), Scoring(0.3), Weighing())
    plain = sigmoid_attention(*qkv, *asked, kernels="reference")
    for kernels in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = sigmoid_attention(*qkv, *asked, kernels=kernels)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), plain, atol=3e-2, rtol=0)


def test_blocks_make_no_square(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    T, window = 1024, 33
    q, k, v = torch.randn(3, 1, T, 2)
    arguments = (q, k, v, None, 1, 1, True, window, 0, None, None, 1.0, None, None, None, True)
    with LargestTensor() as mode:  # the operators' own code: a mode does not see inside an operator
        out = module._banded._init_fn(*arguments)
        module._banded_backward._init_fn(out, *arguments)
    assert mode.size == max(T * 2, 16 * (16 + window - 1))


def test_the_flop_counter_sees_what_blocks_compute():
    q, k, v = (x.requires_grad_() for x in inputs(1000, B=3, H=8, V=6, dtype=torch.float32))
    block, T, window = attention_banded.BLOCK, 1000, 200
    ends = [*range(block, T, block), T]
    pairs = sum((e - s) * (e - max(0, s - window + 1)) for s, e in zip(range(0, T, block), ends, strict=True))
    with FlopCounterMode(display=False) as forward:
        out = sigmoid_attention(q, k, v, Visibility(True, window), Scoring(1.0), Weighing())
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 3 * 4 * (8 + 6) * pairs
    assert backward.get_total_flops() == 2 * 3 * 4 * (3 * 8 + 2 * 6) * pairs


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_of_the_handwritten_backward(normalize, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    monkeypatch.setattr(module, "FOLDED_BELOW", 1)
    leaves = [x.requires_grad_() for x in (*inputs(5, B=1, N=2, K=1, H=2, V=2), HEAD_BIAS[:2].clone())]

    def run(q, k, v, b):
        return sigmoid_attention(q, k, v, Visibility(causal=True), Scoring(0.7), Weighing(None, b, normalize))

    assert torch.autograd.gradcheck(run, leaves)


def test_the_operator_keeps_its_promises_to_the_compiler(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    q, k, v = torch.randn(1, 18, 2), torch.randn(1, 9, 2), torch.randn(1, 9, 3)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(2))]
    torch.library.opcheck(module._banded, (*leaves, 1, 2, True, 3, 0, None, None, 0.5, None, None, None, True))
