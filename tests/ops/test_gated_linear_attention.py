"""Gated linear attention: chunked = recurrent, closed forms, strong decays, low precision, continuation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.ops.gated_linear_attention import CHUNK, gated_linear_attention, gated_linear_attention_flops


def inputs(T, *, strength=1.0, dtype=torch.float64, state=True):
    """q, k, v, logarithms of decays (a few of them −∞), and a memory."""
    q, k, log_decay = torch.randn(3, 2, T, 3, 4, dtype=dtype)
    log_decay = -strength * log_decay.exp()
    log_decay[0, T // 2] = -torch.inf
    v = torch.randn(2, T, 3, 5, dtype=dtype)
    return [q, k, v, log_decay] + ([torch.randn(2, 3, 4, 5, dtype=dtype)] if state else [])


@pytest.mark.parametrize("T", [1, 2, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("strength", [0.02, 1.0, 300.0])
def test_chunked_equals_recurrent_in_values_and_gradients(T, strength):
    tensors = [x.requires_grad_() for x in inputs(T, strength=strength)]
    weight_o, weight_s = torch.randn(2, T, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    results = []
    for kernels in ("auto", "reference"):
        o, state = gated_linear_attention(*tensors, kernels=kernels)
        results.append((o, state, *torch.autograd.grad((o * weight_o).sum() + (state * weight_s).sum(), tensors)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [5, 150])
def test_without_decay_it_is_linear_attention(T):
    q, k, v, _ = inputs(T, state=False)
    o, state = gated_linear_attention(q, k, v, torch.zeros_like(q))
    scores = torch.einsum("btnh,bsnh->bnts", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bnts,bsnf->btnf", scores, v))
    torch.testing.assert_close(state, torch.einsum("btnh,btnf->bnhf", k, v))


def test_decays_multiply_channel_by_channel():
    """``o_i = Σ_{j <= i} Σ_h q_ih k_jh Π_{j < l <= i} decay_lh v_j``, with products taken one by one."""
    T = CHUNK + 3
    q, k, v, log_decay = inputs(T, state=False)
    decay, o = log_decay.exp(), torch.zeros_like(v)
    for i in (0, 1, T // 2, T - 1):
        kept = torch.ones_like(q[:, 0])
        for j in range(i, -1, -1):
            o[:, i] += (q[:, i] * k[:, j] * kept).sum(-1, keepdim=True) * v[:, j]
            kept = kept * decay[:, j]
        torch.testing.assert_close(gated_linear_attention(q, k, v, log_decay)[0][:, i], o[:, i])


@pytest.mark.parametrize("strength", [0.02, 1.0, 300.0])
def test_fp32_is_as_exact_for_strong_decays_as_for_weak_ones(strength):
    tensors = inputs(200, strength=strength, dtype=torch.float32)
    wanted, _ = gated_linear_attention(*(x.double() for x in tensors), kernels="reference")
    o, _ = gated_linear_attention(*tensors)
    torch.testing.assert_close(o.double(), wanted, rtol=1e-4, atol=1e-5)


def test_bf16_rounds_only_inputs_and_outputs():
    tensors = [x.bfloat16() for x in inputs(100, strength=5.0)]
    wanted, _ = gated_linear_attention(*(x.double() for x in tensors), kernels="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = gated_linear_attention(*tensors)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(o.double(), wanted, rtol=2**-7, atol=1e-4)


def test_a_logarithm_of_minus_infinity_forgets():
    q, k, v, log_decay, state = inputs(90)
    log_decay[:, 40] = -torch.inf
    o, last = gated_linear_attention(q, k, v, log_decay, state)
    alone, alone_last = gated_linear_attention(q[:, 40:], k[:, 40:], v[:, 40:], log_decay[:, 40:])
    torch.testing.assert_close(o[:, 40:], alone)
    torch.testing.assert_close(last, alone_last)


@pytest.mark.parametrize("T", [1, 6, 64, 200])
def test_counted_flops_are_those_of_the_products(T):
    with FlopCounterMode(display=False) as counter:
        gated_linear_attention(*(x[:1] for x in inputs(T)))
    assert counter.get_total_flops() == T * gated_linear_attention_flops(T, num_heads=3, head_dim=4, value_dim=5)


def test_flops_per_position_do_not_grow_with_the_length():
    short, long = (gated_linear_attention_flops(T, num_heads=1, head_dim=8, value_dim=8) for T in (512, 8192))
    assert short == long
