"""Attention in blocks of queries, each against the slice of keys it can see: no [T, S] tensor ever exists.

A sliding window costs O(T·W) time and a causal layer half of the square. Only q, k and v are kept for the backward
pass, which makes the probabilities of each block again; memory is that of one block, O(P·(W + P)) per head.

To ``torch.compile`` the loop is one opaque operator: unrolled into a layer's graph it would take long to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from graft.ops.attention_folded import (
    Block,
    fold_keys,
    fold_queries,
    make_block,
    probabilities,
    products,
    unfold_queries,
)
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.decayed_products import decayed_products_backward

BLOCK = 128
"""Query positions per block (P). Smaller blocks waste fewer masked pairs, larger ones make better matrix products."""


def banded_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring, *, dropout: float
) -> Tensor:
    """Attention block by block. Arguments as in `graft.ops.attention.attention`.

    With dropout the blocks go through autograd, which keeps each block's probabilities: O(T·W) memory.

    Returns:
        [B, T, N, H] in the dtype of q. Once differentiable (a second derivative raises), unless there is dropout.
    """
    B, _, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    q, k, v = fold_queries(q_BTNH, K), fold_keys(k_BSKH), fold_keys(v_BSKH)
    if dropout > 0:
        out = _with_dropout(q, k, v, (B, K, N // K), visibility, scoring, dropout)
    else:
        out = _banded(
            q,
            k,
            v,
            B,
            N // K,
            visibility.causal,
            visibility.window,
            visibility.offset,
            visibility.query_segments_BT,
            visibility.key_segments_BS,
            scoring.scale,
            scoring.softcap,
            scoring.slopes_N,
            scoring.rates_H,
        )
    return unfold_queries(out, B, N)


def _with_dropout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int, int],
    visibility: Visibility,
    scoring: Scoring,
    dropout: float,
) -> Tensor:
    outs: list[Tensor] = []
    for block in _blocks(q, k, shape, visibility, scoring):
        p = probabilities(q[:, block.rows], k[:, block.keys], block, scoring)
        outs.append(torch.bmm(F.dropout(p, dropout), v[:, block.keys]))
    return torch.cat(outs, dim=1)


def _blocks(
    q: Tensor, k: Tensor, shape: tuple[int, int, int], visibility: Visibility, scoring: Scoring
) -> Iterator[Block]:
    num_queries = q.shape[1] // shape[2]
    for start in range(0, num_queries, BLOCK):
        queries = range(start, min(start + BLOCK, num_queries))
        yield make_block(visibility, scoring, shape, queries, k.shape[1], q)


def _capped_scores(q: Tensor, k: Tensor, block: Block, scoring: Scoring) -> Tensor:
    """[B·K, P·G, C] scores of one block before distances and mask."""
    scores = products(q, k, block, scoring).mul_(scoring.scale)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    return scores


def _probabilities_(scores: Tensor, block: Block) -> Tensor:
    """`graft.ops.attention_folded.probabilities` from capped scores, overwriting them."""
    for first, last, amounts in block.penalties:
        block.unfold(scores)[..., first:last].sub_(amounts)
    p = torch.softmax(scores, dim=-1)
    if block.hidden is not None:
        block.unfold(p).masked_fill_(block.hidden, 0.0)
    return p


@torch.library.custom_op("graft::banded_attention", mutates_args=())
def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    group: int,
    causal: bool,
    window: int | None,
    offset: int,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    rates: Tensor | None,
) -> Tensor:
    """[B·K, T·G, H] folded queries, [B·K, S, H] keys, values [B·K, S, any width] to [B·K, T·G, that width]."""
    visibility = Visibility(causal, window, offset, query_segments, key_segments)
    scoring = Scoring(scale, softcap, slopes, rates)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for block in _blocks(q, k, (batch, q.shape[0] // batch, group), visibility, scoring):
        rows, keys = block.rows, block.keys
        p = _probabilities_(_capped_scores(q[:, rows], k[:, keys], block, scoring), block)
        torch.bmm(p, v[:, keys], out=out[:, rows])
    return out


@torch.library.custom_op("graft::banded_attention_backward", mutates_args=())
def _banded_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    group: int,
    causal: bool,
    window: int | None,
    offset: int,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of keys and values add up over blocks, in fp32 at least."""
    visibility = Visibility(causal, window, offset, query_segments, key_segments)
    scoring = Scoring(scale, softcap, slopes, rates)
    wide = torch.promote_types(k.dtype, torch.float32)
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for block in _blocks(q, k, (batch, q.shape[0] // batch, group), visibility, scoring):
        rows, keys = block.rows, block.keys
        q_rows, d_rows, k_cols = q[:, rows], d_out[:, rows], k[:, keys]
        scores = _capped_scores(q_rows, k_cols, block, scoring)
        slope = None if softcap is None else 1 - (scores / softcap).square()
        p = _probabilities_(scores, block)
        d_v[:, keys] += torch.bmm(p.transpose(1, 2), d_rows)
        d_p = torch.bmm(d_rows, v[:, keys].transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
        if slope is not None:
            d_scores.mul_(slope)
        if rates is None:
            torch.bmm(d_scores, k_cols, out=d_q[:, rows])
            d_k[:, keys] += torch.bmm(d_scores.transpose(1, 2), q_rows)
        else:
            place = (group, block.start + offset, block.first, causal)
            d_q[:, rows], d_k_cols = decayed_products_backward(d_scores, q_rows, k_cols, rates, *place)
            d_k[:, keys] += d_k_cols
    return d_q.mul_(scale), d_k.mul_(scale).to(k.dtype), d_v.to(v.dtype)


@_banded.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])


@_banded_backward.register_fake
def _(_d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (autograd's signature)
    """Keeps the arguments for the backward pass: tensors where autograd can check that they were not changed."""
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.arguments = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)


def kept_arguments(ctx: Any) -> list[Any]:
    """What `keep_arguments` kept, in order."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if x is None else x[0] for x in ctx.arguments]


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `_banded`'s arguments; all but q, k and v are constants."""
    arguments = kept_arguments(ctx)
    return *_banded_backward(d_out.contiguous(), *arguments), *(None,) * (len(arguments) - 3)


_banded.register_autograd(_backward, setup_context=keep_arguments)


def pair_flops(over_keys: int, over_values: int, q: Any, k: Any, v: Any, _batch: int, *settings: Any) -> int:
    """Matrix products over the pairs that blocks compute, hidden ones inside a block's range included.

    Args:
        over_keys: products with a side as wide as keys.
        over_values: products with a side as wide as values.
        q, k, v: shapes.
        settings: the rest of the operator's arguments.
    """
    group, causal, window, offset = settings[:4]
    visibility = Visibility(causal, window, offset)
    num_queries, pairs = q[1] // group, 0
    for start in range(0, num_queries, BLOCK):
        end = min(start + BLOCK, num_queries)
        first, last = visibility.key_range(start, end, k[1])
        pairs += (end - start) * (last - first)
    return 2 * q[0] * group * (over_keys * q[2] + over_values * v[2]) * pairs


@register_flop_formula(torch.ops.graft.banded_attention)
def _forward_flops(*arguments: Any, **_: Any) -> int:
    """For PyTorch's FLOP counter: scores and outputs."""
    return pair_flops(1, 1, *arguments)


@register_flop_formula(torch.ops.graft.banded_attention_backward)
def _backward_flops(_d_out: Any, *arguments: Any, **_: Any) -> int:
    """For PyTorch's FLOP counter: scores again, and the gradients of v, probabilities, q and k."""
    return pair_flops(3, 2, *arguments)
