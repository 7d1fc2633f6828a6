"""Short convolutions: both forms, PyTorch's convolution as oracle, documents, padding, continuation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.ops.short_conv import causal_conv, centred_conv, empty_conv_state

CPU = torch.device("cpu")


def tensors(B=2, T=11, D=3, K=4, dtype=torch.float64):
    return torch.randn(B, T, D, dtype=dtype), torch.randn(D, K, dtype=dtype), torch.randn(D, dtype=dtype)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_values_are_those_of_conv1d(kernels, K, T):
    x, w, b = tensors(T=T, K=K)
    wanted = F.conv1d(F.pad(x.mT, (K - 1, 0)), w[:, None], b, groups=3).mT
    torch.testing.assert_close(causal_conv(x, w, b, kernels=kernels)[0], wanted)
    ahead = (K - 1) // 2
    centred = F.conv1d(F.pad(x.mT, (K - 1 - ahead, ahead)), w[:, None], b, groups=3).mT
    torch.testing.assert_close(centred_conv(x, w, b, kernels=kernels), centred)


documents = st.lists(st.sampled_from([0, 3, 3, 5, 5, 7]), min_size=9, max_size=9)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("dilation", [2, 3])
def test_dilated_values_are_those_of_conv1d(kernels, dilation):
    x, w, b = tensors(K=4)
    how = {"dilation": dilation, "kernels": kernels}
    wanted = F.conv1d(F.pad(x.mT, (3 * dilation, 0)), w[:, None], b, groups=3, dilation=dilation).mT
    torch.testing.assert_close(causal_conv(x, w, b, **how)[0], wanted)
    centred = F.conv1d(F.pad(x.mT, (2 * dilation, dilation)), w[:, None], b, groups=3, dilation=dilation).mT
    torch.testing.assert_close(centred_conv(x, w, b, **how), centred)


@settings(max_examples=40)
@given(segments=st.tuples(documents, documents), centred=st.booleans(), bias=st.booleans(), dilation=st.integers(1, 3))
def test_both_forms_agree_in_values_and_gradients(segments, centred, bias, dilation):
    x, w, b = tensors(T=9)
    inputs = [x, w, b] if bias else [x, w]
    for tensor in inputs:
        tensor.requires_grad_()
    ids, direction, results = torch.tensor(segments), torch.randn_like(x), []
    for kernels in ("auto", "reference"):
        conv = centred_conv if centred else lambda *args, **how: causal_conv(*args, **how)[0]
        y = conv(x, w, b if bias else None, ids, dilation=dilation, kernels=kernels)
        results.append((y, *torch.autograd.grad((y * direction).sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("conv", [lambda *a: causal_conv(*a)[0], centred_conv])
def test_a_document_computes_what_it_computes_alone(conv):
    x, w, b = tensors(T=12)
    lengths, ids = [3, 1, 6, 2], [9, 4, 2, 0]
    segments = torch.cat([torch.full((2, n), i) for n, i in zip(lengths, ids, strict=True)], dim=1)
    packed = conv(x, w, b, segments).split(lengths, dim=1)
    for i, piece in enumerate(x.split(lengths, dim=1)):
        alone = b.expand_as(piece) if ids[i] == 0 else conv(piece, w, b)
        torch.testing.assert_close(packed[i], alone)


@settings(max_examples=40)
@given(
    segments=st.none() | st.tuples(documents, documents),
    cuts=st.sets(st.integers(1, 8)),
    width=st.integers(1, 5),
    dilation=st.integers(1, 3),
    kernels=st.sampled_from(["auto", "reference"]),
)
def test_in_chunks_it_computes_the_same(segments, cuts, width, dilation, kernels):
    x, w, b = tensors(T=9, K=width)
    ids = None if segments is None else torch.tensor(segments)
    whole, _ = causal_conv(x, w, b, ids, dilation=dilation)
    state = empty_conv_state(2, 3, width, dilation=dilation, device=CPU, dtype=x.dtype)
    pieces, edges = [], [0, *sorted(cuts), 9]
    for start, end in itertools.pairwise(edges):
        now = None if ids is None else ids[:, start:end]
        y, state = causal_conv(x[:, start:end], w, b, now, state, dilation=dilation, kernels=kernels)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    length = (width - 1) * dilation
    assert [tuple(t.shape) for t in state] == [(2, length, 3), (2, length)]


def test_gradients_are_right():
    x, w, b = (t.requires_grad_() for t in tensors(B=1, T=5, D=2, K=3))
    ids = torch.tensor([[1, 1, 2, 2, 0]])
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, ids)[0], (x, w, b))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_its_dtype(weights):
    x, w, b = tensors(dtype=torch.float32)
    exact, _ = causal_conv(x, w, b)
    y, _ = causal_conv(x.bfloat16(), w.to(weights), b.to(weights))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-6, atol=2**-6)
