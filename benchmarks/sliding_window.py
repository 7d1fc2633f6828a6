"""What does a sliding window of 512 cost, forward and backward, against PyTorch's fused attention?

The peer runs the window as a dense mask, the way models without a kernel of their own do, and once full causal.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Timed, comparison, interleaved, record
from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.training.matmul import use_onednn_fp32

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 8, 2, 64, 512
LENGTHS = (1024, 2048, 4096, 8192)


def run(args: argparse.Namespace) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        timed = {T: measure(T, dtype, args.rounds) for T in LENGTHS}
        parts = [f"T = {T}, {name}:\n\n{comparison(t, 'graft window')}" for T, t in timed.items()]
        ends = [min(timed[T]["graft window"].cpu_seconds) for T in (2048, 8192)]
        exponent = math.log(ends[1] / ends[0]) / math.log(8192 / 2048)
        parts.append(f"Time grows as T^{exponent:.2f} from 2048 to 8192 (least processor time).")
        parts.append(saved_tensors(dtype))
        record(
            f"Sliding window of {WINDOW}, forward and backward, {name}",
            f"One sequence, {HEADS} heads on {KV_HEADS} key heads of {HEAD_DIM} channels.\n\n" + "\n\n".join(parts),
        )


def measure(T: int, dtype: torch.dtype, rounds: int) -> dict[str, Timed]:
    """All variants at one length, after checking that they agree."""
    q, k, v = (torch.randn(1, T, heads, HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - WINDOW)
    variants: dict[str, Callable[[], Tensor]] = {
        "graft window": lambda: attention(q, k, v, Visibility(True, WINDOW), Scoring(HEAD_DIM**-0.5)),
        "graft full causal": lambda: attention(q, k, v, Visibility(causal=True), Scoring(HEAD_DIM**-0.5)),
        "fused kernel, window as a mask": partial(fused, q, k, v, mask=seen),
        "fused kernel, full causal": partial(fused, q, k, v, mask=None),
    }
    torch.testing.assert_close(variants["graft window"](), fused(q, k, v, mask=seen), rtol=2e-2, atol=2e-2)

    def both_ways(name: str, form: Callable[[], Tensor]) -> None:
        use_onednn_fp32(name.startswith("graft"))  # what graft finds out at its start; no peer of ours sets it
        form().backward(direction)
        for x in (q, k, v):
            x.grad = None

    direction = torch.randn(1, T, HEADS, HEAD_DIM).to(dtype)
    return interleaved({name: partial(both_ways, name, form) for name, form in variants.items()}, rounds=rounds)


def fused(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled_dot_product_attention on [B, T, N, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def saved_tensors(dtype: torch.dtype) -> str:
    """How large the largest tensor is that an operation of our forward and backward makes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
            return out

    T = LENGTHS[-1]
    q, k, v = (torch.randn(1, T, heads, HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with Largest() as largest:
        attention(q, k, v, Visibility(True, WINDOW), Scoring(1.0)).sum().backward()
    assert largest.numel < T * T, "some tensor is as large as the square of the length"
    return f"The largest tensor at T = {T} has {largest.numel:,} elements; T x T per head would be {T * T:,}."
