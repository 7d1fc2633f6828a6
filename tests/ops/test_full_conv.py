"""Full convolutions: both forms, PyTorch's convolution as oracle, documents, padding, continuation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.ops.full_conv import causal_full_conv, centred_full_conv
from graft.ops.short_conv import empty_conv_state

CPU = torch.device("cpu")


def tensors(B: int = 2, T: int = 11, K: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, T, 3, dtype=dtype), torch.randn(5, 3, K, dtype=dtype), torch.randn(5, dtype=dtype)


def causal(*args: Tensor | None, **how: str) -> Tensor:
    return causal_full_conv(*args, **how)[0]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_values_are_those_of_conv1d(kernels: str, K: int, T: int) -> None:
    x, w, b = tensors(T=T, K=K)
    wanted = F.conv1d(F.pad(x.mT, (K - 1, 0)), w, b).mT
    torch.testing.assert_close(causal(x, w, b, kernels=kernels), wanted)
    ahead = (K - 1) // 2
    wanted = F.conv1d(F.pad(x.mT, (K - 1 - ahead, ahead)), w, b).mT
    torch.testing.assert_close(centred_full_conv(x, w, b, kernels=kernels), wanted)


documents = st.lists(st.sampled_from([0, 3, 3, 5, 5, 7]), min_size=9, max_size=9)


@settings(max_examples=40)
@given(segments=st.tuples(documents, documents), centred=st.booleans(), bias=st.booleans())
def test_both_forms_agree_in_values_and_gradients(
    segments: tuple[list[int], list[int]], centred: bool, bias: bool
) -> None:
    x, w, b = tensors(T=9)
    inputs = [x, w, b] if bias else [x, w]
    for tensor in inputs:
        tensor.requires_grad_()
    ids, direction, results = torch.tensor(segments), torch.randn(2, 9, 5, dtype=torch.float64), []
    for kernels in ("auto", "reference"):
        y = (centred_full_conv if centred else causal)(x, w, b if bias else None, ids, kernels=kernels)
        results.append((y, *torch.autograd.grad((y * direction).sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("conv", [causal, centred_full_conv])
def test_a_document_computes_what_it_computes_alone(conv) -> None:
    x, w, b = tensors(T=12)
    lengths, ids = [3, 1, 6, 2], [9, 4, 2, 0]
    segments = torch.cat([torch.full((2, n), i) for n, i in zip(lengths, ids, strict=True)], dim=1)
    packed = conv(x, w, b, segments).split(lengths, dim=1)
    for i, piece in enumerate(x.split(lengths, dim=1)):
        alone = b.expand(*piece.shape[:2], 5) if ids[i] == 0 else conv(piece, w, b)
        torch.testing.assert_close(packed[i], alone)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 1, 2, 4]])
@pytest.mark.parametrize("packed", [False, True])
def test_continuing_equals_one_call(kernels: str, sizes: list[int], packed: bool) -> None:
    x, w, b = tensors()
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 7], [1] * 5 + [2] * 6]) if packed else None
    state = empty_conv_state(2, 3, 4, device=CPU, dtype=torch.float64)
    pieces, start = [], 0
    for size in sizes:
        now = slice(start, start + size)
        y, state = causal_full_conv(
            x[:, now], w, b, None if segments is None else segments[:, now], state, kernels=kernels
        )
        pieces.append(y)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), causal(x, w, b, segments))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    x, w, b = tensors(dtype=dtype)
    exact = causal(x.double(), w.double(), b.double())
    for kernels in ("auto", "reference"):
        y = causal(x, w, b, kernels=kernels)
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() < tolerance * exact.abs().max()
