"""The convolution as a part: its formula, its reach, its state and its cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recurrent_checks import (
    CPU,
    assert_decoding_equals_forward,
    assert_documents_are_alone,
    build,
    context,
    splits,
)
from torch.utils.flop_counter import FlopCounterMode

from graft.part import parameter_roles, tensors_of
from graft.token_mixers.conv_config import ConvConfig


def test_plain_is_a_depthwise_separable_convolution():
    part = build(ConvConfig(kernel_size=3, activation="relu2", conv_bias=True, output_bias=True))
    names = dict(part.named_parameters())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    inner = F.conv1d(F.pad(x.mT, (2, 0)), names["conv.weight"][:, None], names["conv.bias"], groups=24).mT
    wanted = inner.clamp_min(0).square() @ names["o_proj.weight"].mT + names["o_proj.bias"]
    torch.testing.assert_close(part(x, context(x)).y, wanted)


@pytest.mark.parametrize("activation", ["gelu", None])
def test_gated_puts_the_activation_on_the_gate(activation):
    part = build(ConvConfig(gated=True, activation=activation))
    names = dict(part.named_parameters())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    inner = F.conv1d(F.pad(x.mT, (3, 0)), names["conv.weight"][:, None], groups=24).mT
    gate = x @ names["gate_proj.weight"].mT
    wanted = ((F.gelu(gate) if activation else gate) * inner) @ names["o_proj.weight"].mT
    torch.testing.assert_close(part(x, context(x)).y, wanted)


@pytest.mark.parametrize(("causal", "size", "reach"), [(True, 4, (-3, 0)), (False, 5, (-2, 2)), (False, 4, (-2, 1))])
def test_it_reaches_as_far_as_its_kernel(causal, size, reach):
    part = build(ConvConfig(kernel_size=size), causal=causal)
    x = torch.randn(1, 13, 24, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(part(x, context(x, causal=causal)).y[0, 6].sum(), x)
    first, last = reach
    assert (grad[0].abs().sum(-1) > 0).tolist() == [first <= t - 6 <= last for t in range(13)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_documents_are_alone(causal, kernels):
    part = build(ConvConfig(), causal=causal)
    part.kernels = kernels
    assert_documents_are_alone(part, causal=causal)


@settings(max_examples=15)
@given(sizes=splits(11), packed=st.booleans())
def test_decoding_equals_forward(sizes, packed):
    assert_decoding_equals_forward(build(ConvConfig(gated=True)), sizes, packed=packed)


def test_state_roles_and_cost():
    part = build(ConvConfig(kernel_size=5, gated=True, conv_bias=True))
    per_sequence = 4 * 24 * 4 + 4 * 8  # four inputs of 24 fp32 channels, and their document numbers
    assert part.state_bytes(7, torch.float32) == part.state_bytes(7000, torch.float32) == per_sequence
    state = part.init_state(3, 50, device=CPU, dtype=torch.float32)
    assert sum(t.numel() * t.element_size() for t in tensors_of(state)) == 3 * per_sequence
    roles = parameter_roles(part)
    assert roles == {
        "conv.weight": "conv",
        "conv.bias": "bias",
        "gate_proj.weight": "other",
        "o_proj.weight": "other",
    }
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        part(x, context(x))
    assert counter.get_total_flops() == 20 * part.flops_per_token(20)


def test_a_kernel_without_neighbours_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        ConvConfig(kernel_size=2)
