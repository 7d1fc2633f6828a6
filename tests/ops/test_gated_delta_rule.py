"""The gated delta rule: chunked = recurrent, transformers' chunked form, closed forms, strong decays, low precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from graft.ops.gated_delta_rule import CHUNK, gated_delta_rule, gated_delta_rule_flops


def inputs(T, *, strength=1.0, dtype=torch.float64, state=True, forget=True):
    """q, k of length 1, v, logarithms of decays (one of them −∞), shares, and a memory."""
    q, k = F.normalize(torch.randn(2, 2, T, 3, 4, dtype=dtype), dim=-1)
    v = torch.randn(2, T, 3, 5, dtype=dtype)
    log_decay = -strength * torch.randn(2, T, 3, dtype=dtype).exp()
    if forget:
        log_decay[0, T // 2] = -torch.inf
    beta = torch.rand(2, T, 3, dtype=dtype)
    return [q, k, v, log_decay, beta] + ([torch.randn(2, 3, 4, 5, dtype=dtype)] if state else [])


@pytest.mark.parametrize("T", [1, 2, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("strength", [0.02, 1.0, 300.0])
def test_chunked_equals_recurrent_in_values_and_gradients(T, strength):
    tensors = [x.requires_grad_() for x in inputs(T, strength=strength)]
    weight_o, weight_s = torch.randn(2, T, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    results = []
    for kernels in ("auto", "reference"):
        o, state = gated_delta_rule(*tensors, kernels=kernels)
        results.append((o, state, *torch.autograd.grad((o * weight_o).sum() + (state * weight_s).sum(), tensors)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [9, 130])
def test_values_are_those_of_transformers(T):
    q, k, v, log_decay, beta, state = (x.float() for x in inputs(T, forget=False))
    wanted, last = torch_chunk_gated_delta_rule(q, k, v, log_decay, beta, initial_state=state, output_final_state=True)
    o, ours = gated_delta_rule(q * 4**-0.5, k, v, log_decay, beta, state)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, last, rtol=1e-4, atol=1e-5)


def test_with_full_shares_and_orthogonal_keys_it_is_a_table():
    """Each key's entry is the value last written to it, however often it was written."""
    T, keys = 100, torch.eye(4, dtype=torch.float64)
    which = torch.randint(4, (T,))
    v = torch.randn(1, T, 1, 5, dtype=torch.float64)
    k = keys[which][None, :, None]
    zeros, ones = torch.zeros(1, T, 1, dtype=torch.float64), torch.ones(1, T, 1, dtype=torch.float64)
    o, table = gated_delta_rule(k, k, v, zeros, ones)
    torch.testing.assert_close(o, v)
    for key in range(4):
        last = (which == key).nonzero().max()
        torch.testing.assert_close(table[0, 0, key], v[0, last, 0])


def test_a_step_is_the_papers_equation():
    q, k, v, log_decay, beta, state = inputs(1)
    _, after = gated_delta_rule(q, k, v, log_decay, beta, state)
    alpha, share, key = log_decay[1, 0, 2].exp(), beta[1, 0, 2], k[1, 0, 2]
    erased = torch.eye(4, dtype=torch.float64) - share * torch.outer(key, key)
    wanted = alpha * state[1, 2].mT @ erased + share * torch.outer(v[1, 0, 2], key)
    torch.testing.assert_close(after[1, 2].mT, wanted)


@pytest.mark.parametrize("strength", [0.02, 1.0, 300.0])
def test_fp32_is_as_exact_for_strong_decays_as_for_weak_ones(strength):
    tensors = inputs(200, strength=strength, dtype=torch.float32)
    wanted, _ = gated_delta_rule(*(x.double() for x in tensors), kernels="reference")
    torch.testing.assert_close(gated_delta_rule(*tensors)[0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_bf16_rounds_only_inputs_and_outputs():
    tensors = [x.bfloat16() for x in inputs(100, strength=0.1)]
    wanted, _ = gated_delta_rule(*(x.double() for x in tensors), kernels="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = gated_delta_rule(*tensors)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(o.double(), wanted, rtol=2**-7, atol=1e-4)


def test_a_logarithm_of_minus_infinity_forgets_and_a_share_of_zero_keeps():
    q, k, v, log_decay, beta, state = inputs(90)
    log_decay[:, 40] = -torch.inf
    beta[:, 70:], log_decay[:, 70:] = 0.0, 0.0
    o, last = gated_delta_rule(q, k, v, log_decay, beta, state)
    alone, alone_last = gated_delta_rule(*(x[:, 40:70] for x in (q, k, v, log_decay, beta)))
    torch.testing.assert_close(o[:, 40:70], alone)
    torch.testing.assert_close(last, alone_last)


def solve_flops(system_shape, sides_shape, *args, out_shape=None, **kwargs) -> int:
    """Half a square times the sides, multiply and add."""
    *batch, size, columns = sides_shape
    return torch.Size(batch).numel() * size * size * columns


@pytest.mark.parametrize("T", [1, 6, 64, 200])
def test_counted_flops_are_those_of_the_products(T):
    mapping = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        gated_delta_rule(*(x[:1] for x in inputs(T)))
    counted = T * gated_delta_rule_flops(T, num_heads=3, head_dim=4, value_dim=5)
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-12)
