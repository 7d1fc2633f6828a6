"""Our attention with xPos is torchscale's, whose authors are xPos's.

Theirs multiplies queries and keys by powers of ζ counted from the middle of the sequence, ours each pair's product by
the power of the distance. Pairs that rotate are channels (2i, 2i + 1) there and (i, i + H/2) here: rows of q_proj and
k_proj, and entries of their biases, change places. Their softmax and our tables of rotations are fp32.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from layers import Layers, context, our_layer
from torch import Tensor, nn
from weights import TOLERANCE, assert_close

B, T, N, H = 2, 17, 3, 6
D = N * H
SCALE_BASE = 4
"""Small, so that fading shows within T."""


def our_name(name: str) -> str:
    return name.replace("out_proj", "o_proj")


def our_rows(name: str, tensor: Tensor) -> Tensor:
    """Of each head first the even channels, then the odd ones."""
    if not name.startswith(("q_proj", "k_proj")):
        return tensor
    return tensor.unflatten(0, (N, H // 2, 2)).transpose(1, 2).flatten(0, 2)


def layers(kernels: str) -> Layers:
    position = {"type": "xpos", "scale_base": SCALE_BASE}
    mixer = {"type": "attention", "num_heads": N, "position": position, "qkv_bias": True, "output_bias": True}
    args = oracles.torchscale("architecture.config").DecoderConfig(xpos_rel_pos=True, xpos_scale_base=SCALE_BASE)
    attention = oracles.torchscale("component.multihead_attention").MultiheadAttention
    theirs = attention(args, D, N, self_attention=True).double()
    return Layers(our_layer(D, mixer, kernels=kernels), theirs, our_name, our_rows)


def causal(theirs: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
    return theirs(x, x, x, attn_mask=hidden)[0]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_values_and_gradients(kernels: str) -> None:
    pair = layers(kernels)
    x = torch.randn(B, T, D, dtype=torch.float64)
    pair.assert_same(x, lambda x: causal(pair.theirs, x), 10 * TOLERANCE)


@torch.no_grad()
def test_forward_is_their_decoding() -> None:
    """Theirs keeps keys without positions and encodes all of them anew at every step."""
    pair = layers("auto")
    pair.copy_weights()
    x, incremental = torch.randn(B, T, D, dtype=torch.float64), {}
    full = pair.ours(x, context(x)).y
    for t in range(T):
        now = x[:, t : t + 1]
        expected, _ = pair.theirs(now, now, now, incremental_state=incremental)
        assert_close(full[:, t : t + 1], expected, f"output at {t}", 10 * TOLERANCE)


def test_fading_shows() -> None:
    """A scale_base at which nothing fades gives theirs another answer."""
    pair = layers("auto")
    pair.copy_weights()
    x = torch.randn(B, T, D, dtype=torch.float64)
    faded = causal(pair.theirs, x)
    pair.theirs.xpos.scale_base = 1e9
    assert (causal(pair.theirs, x) - faded).abs().max() > 1e-2 * faded.abs().max()
