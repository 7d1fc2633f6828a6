"""Our sigmoid attention is x-transformers', in fp64.

Theirs adds no bias of its own: ours (−log of the number of keys seen, or a number) goes in as its bias of positions,
and a window as its mask. Their query head n reads key head n mod K, ours n // (N / K): heads of to_q and of to_out
change places.
"""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from layers import Layers, our_layer
from torch import Tensor

B, T, N, K, H, D = 2, 13, 4, 2, 5, 18
NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "o_proj"}


def our_name(name: str) -> str:
    module, parameter = name.split(".")
    return f"{NAMES[module]}.{parameter}"


def our_heads(name: str, tensor: Tensor) -> Tensor:
    """Heads (N / K, K) as (K, N / K)."""
    if name == "to_q.weight":
        return tensor.unflatten(0, (N // K, K, H)).transpose(0, 1).flatten(0, 2)
    if name == "to_out.weight":
        return tensor.unflatten(1, (N // K, K, H)).transpose(1, 2).flatten(1, 3)
    return tensor


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("bias", ["auto", 0.0, -1.5])
def test_values_and_gradients(bias: Any, window: int | None, kernels: str) -> None:
    mixer = {"type": "sigmoid_attention", "num_heads": N, "num_kv_heads": K, "head_dim": H, "bias": bias}
    ours = our_layer(D, {**mixer, "sliding_window": window, "position": {"type": "none"}}, kernels=kernels)
    attention = oracles.x_transformers().Attention
    theirs = attention(D, heads=N, kv_heads=K, dim_head=H, causal=True, sigmoid=True).double()
    near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - (window or T))
    numbers = near.sum(1, dtype=torch.float64)
    added = -numbers.log() if bias == "auto" else torch.full_like(numbers, bias)

    def run(x: Tensor) -> Tensor:
        return theirs(x, attn_mask=near, rel_pos=lambda i, j: added[:, None].expand(i, j))

    x = torch.randn(B, T, D, dtype=torch.float64)
    Layers(ours, theirs, our_name, our_heads).assert_same(x, run, 1e-12)
