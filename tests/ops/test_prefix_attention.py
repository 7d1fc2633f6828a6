"""Attention beside persistent keys: blocks against all pairs, and PyTorch's own attention as oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graft.ops.prefix_attention import Prefix, prefix_attention, window_attention

N, H, P = 2, 4, 3


def drawn(T: int, dtype=torch.float64, count: int = P):
    q, k, v = (torch.randn(2, T, N, H, dtype=dtype, requires_grad=True) for _ in range(3))
    bank = (torch.randn(count, N, H, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v, Prefix(*bank)


SEGMENTS = torch.tensor([[4] * 5 + [9] + [2] * 11, [0] * 3 + [1] * 12 + [0] * 2])


@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 30])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_blocks_equal_all_pairs(window, packed, dtype, tolerance):
    q, k, v, prefix = drawn(17, dtype)
    segments, slopes = (SEGMENTS if packed else None), torch.tensor([0.5, 0.1])
    results = []
    for kernels in ("auto", "reference"):
        y = window_attention(
            q, k, v, prefix, scale=0.5, window=window, segment_ids_BT=segments, slopes_N=slopes, kernels=kernels
        )
        y = y[SEGMENTS != 0] if packed else y
        results.append((y, *torch.autograd.grad(y.float().sin().sum(), [q, k, v, *prefix])))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [1, 4, 17])
def test_pytorchs_attention_on_the_joined_keys(window):
    q, k, v, prefix = drawn(17)
    y = window_attention(q, k, v, prefix, scale=0.5, window=window, segment_ids_BT=None)
    far = torch.arange(17)[:, None] - torch.arange(17)
    seen = F.pad((far >= 0) & (far < window), (P, 0), value=True)
    joined = (torch.cat((a.expand(2, -1, -1, -1), b), 1).transpose(1, 2) for a, b in zip(prefix, (k, v), strict=True))
    wanted = F.scaled_dot_product_attention(q.transpose(1, 2), *joined, attn_mask=seen, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    inputs = [q, k, v, *prefix]
    for a, b in zip(*(torch.autograd.grad(z.sin().sum(), inputs) for z in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_who_sees_no_key_gets_zeros_and_no_gradient():
    q, k, v, none = drawn(4, count=0)
    seen = torch.ones(1, 4, 4, dtype=torch.bool).tril(-1)
    y = prefix_attention(q, k, v, none, scale=1.0, seen_BTS=seen)
    assert (y[:, 0] == 0).all()
    assert (y[:, 1:] != 0).any()
    (gradient,) = torch.autograd.grad(y.sum(), q)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 0] == 0).all()
