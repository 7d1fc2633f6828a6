"""Attention beside persistent keys: blocks against all pairs, and PyTorch's own attention as oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graft.ops.prefix_attention import Nearness, Prefix, prefix_attention, window_attention

N, H, P = 2, 4, 3


def drawn(T: int, dtype=torch.float64, count: int = P):
    q, k, v = (torch.randn(2, T, N, H, dtype=dtype, requires_grad=True) for _ in range(3))
    bank = (torch.randn(count, N, H, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v, Prefix(*bank)


SEGMENTS = torch.tensor([[4] * 5 + [9] + [2] * 11, [0] * 3 + [1] * 12 + [0] * 2])


@pytest.mark.parametrize("fading", [{}, {"slopes_N": [0.5, 0.1]}, {"rates_H": [0.0, 0.02, 0.5, 3.0]}], ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 30])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_equal_all_pairs(window, packed, dtype, tolerance, fading, causal):
    q, k, v, prefix = drawn(17, dtype)
    segments = SEGMENTS if packed else None
    slopes, rates = (torch.tensor(fading[name]) if name in fading else None for name in ("slopes_N", "rates_H"))
    nearness = Nearness(slopes, rates)
    results = []
    for kernels in ("auto", "reference"):
        y = window_attention(
            q, k, v, prefix, scale=0.5, window=window, segment_ids_BT=segments, nearness=nearness, causal=causal,
            kernels=kernels,
        )  # fmt: skip
        y = y[SEGMENTS != 0] if packed else y
        results.append((y, *torch.autograd.grad(y.float().sin().sum(), [q, k, v, *prefix])))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 4, 17])
def test_pytorchs_attention_on_the_joined_keys(window, causal):
    q, k, v, prefix = drawn(17)
    y = window_attention(q, k, v, prefix, scale=0.5, window=window, segment_ids_BT=None, causal=causal)
    far = torch.arange(17)[:, None] - torch.arange(17)
    seen = F.pad((far >= (0 if causal else 1 - window)) & (far < window), (P, 0), value=True)
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


def test_fading_by_its_definition() -> None:
    """Two stretches of keys with equal indices; persistent keys stand at distance 0."""
    q, k, v, prefix = drawn(5)
    rates = torch.tensor([0.0, 0.1, 1.0, 2.0], dtype=torch.float64)
    seen = torch.ones(1, 5, 5, dtype=torch.bool).tril().repeat(1, 1, 2)
    keys, values = torch.cat((k, 2 * k), 1), torch.cat((v, -v), 1)
    nearness = Nearness(rates_H=rates, copies=2)
    y = prefix_attention(q, keys, values, prefix, scale=0.5, seen_BTS=seen, nearness=nearness)
    for t in range(5):
        index = torch.arange(t + 1)
        fading = torch.exp(-rates * (t - index)[:, None])[:, None]
        near = [(q[:, t, None] * key * fading).sum(-1) for key in (k[:, : t + 1], 2 * k[:, : t + 1])]
        first = torch.einsum("bnh,pnh->bpn", q[:, t], prefix.k_PNH)
        weights = (0.5 * torch.cat((first, *near), dim=1)).softmax(1)
        mixed = torch.cat((prefix.v_PNH.expand(2, -1, -1, -1), v[:, : t + 1], -v[:, : t + 1]), dim=1)
        torch.testing.assert_close(y[:, t], torch.einsum("bpn,bpnh->bnh", weights, mixed))
