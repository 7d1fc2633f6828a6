"""Sigmoid attention: one function, and the kernels that compute it in blocks of queries.

A weight depends on its own score alone, so that a block needs no statistics of its row but the number of keys seen (for
the bias) and, when normalised, the sum of weights. Only q, k and v are kept for the backward pass; from `FOLDED_BELOW`
queries on no [T, S] tensor ever exists. To ``torch.compile`` the loop over blocks is one opaque operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from graft.ops.attention import FOLDED_BELOW
from graft.ops.attention_banded import BLOCK, keep_arguments, kept_arguments, pair_flops
from graft.ops.attention_folded import (
    Block,
    fold_keys,
    fold_queries,
    make_block,
    products,
    unfold_queries,
)
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.autocast import full_precision, matmul_operand
from graft.ops.decayed_products import decayed_products_backward
from graft.ops.kernels import Kernels
from graft.ops.sigmoid_attention_reference import NORMALIZER_EPS, Weighing, reference_sigmoid_attention
from graft.shapes import Float


def sigmoid_attention(
    q_BTNH: Float[Tensor, "B T N H"],
    k_BSKH: Float[Tensor, "B S K H"],
    v_BSKH: Float[Tensor, "B S K v_head_dim"],
    visibility: Visibility,
    scoring: Scoring,
    weighing: Weighing,
    *,
    kernels: Kernels = "auto",
) -> Float[Tensor, "B T N v_head_dim"]:
    """``Σ_j σ(score_j + bias) v_j`` over the keys a query may see; see `Scoring` and `Weighing`.

    Under autocast q, k and v are cast to its dtype; weights and their sums are fp32 in every form.

    Args:
        q_BTNH: queries, N = K·G heads; head n reads key head n // G.
        k_BSKH: keys.
        v_BSKH: values, which may have more or fewer channels than keys.
        visibility: which keys a query sees.
        scoring: how q·k becomes a score; without a soft cap.
        weighing: how scores become weights.
        kernels: ``reference`` forces the plain definition.

    Returns:
        In the dtype of q (autocast's under autocast). A query that sees no key (padding) gives zeros, and no gradient.
    """
    assert scoring.softcap is None, "a sigmoid caps by itself"
    assert (visibility.query_segments_BT is None) == (visibility.key_segments_BS is None), "segments go together"
    T, S, window = q_BTNH.shape[1], k_BSKH.shape[1], visibility.window
    q_BTNH, k_BSKH, v_BSKH = (matmul_operand(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    with full_precision(q_BTNH.device):
        if kernels == "reference":
            return reference_sigmoid_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, weighing)
        if T >= FOLDED_BELOW or (window is not None and window < S and T > BLOCK):
            return banded_sigmoid_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, weighing)
        return folded_sigmoid_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, weighing)


def folded_sigmoid_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring, weighing: Weighing
) -> Tensor:
    """One block that holds every query: O(T·S) memory, best for short sequences on a CPU."""
    B, T, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    q, k, v = fold_queries(q_BTNH, K), fold_keys(k_BSKH), fold_keys(v_BSKH)
    block = _block(q, k, (B, K, N // K), range(T), visibility, scoring)
    v = v[:, block.keys]
    w = _weights(q, k[:, block.keys], block, visibility, scoring, weighing)
    return unfold_queries((torch.bmm(w.p.to(v.dtype), v) / w.total).to(v.dtype), B, N)


def banded_sigmoid_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring, weighing: Weighing
) -> Tensor:
    """Block by block; once differentiable (a second derivative raises)."""
    B, _, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    mask = (visibility.causal, visibility.window, visibility.offset)
    segments = (visibility.query_segments_BT, visibility.key_segments_BS)
    terms = (scoring.scale, scoring.slopes_N, scoring.rates_H, weighing.bias, weighing.normalize)
    folded = (fold_queries(q_BTNH, K), fold_keys(k_BSKH), fold_keys(v_BSKH))
    return unfold_queries(_banded(*folded, weighing.bias_N, B, N // K, *mask, *segments, *terms), B, N)


class _Weights(NamedTuple):
    """Weights of one block.

    Args:
        p: [B·K, P·G, C] before they are divided by ``total``, exactly 0 where hidden; fp32 at least.
        total: [B·K, P·G, 1], what the weighted sum of values is divided by; 1 without normalisation.
    """

    p: Tensor
    total: Tensor


def _block(
    q: Tensor, k: Tensor, shape: tuple[int, int, int], queries: range, visibility: Visibility, scoring: Scoring
) -> Block:
    """The block with its penalties in fp32 at least, as scores are."""
    like = q.new_empty((), dtype=torch.promote_types(q.dtype, torch.float32))
    return make_block(visibility, scoring, shape, queries, k.shape[1], like)


def _blocks(
    q: Tensor, k: Tensor, shape: tuple[int, int, int], visibility: Visibility, scoring: Scoring
) -> Iterator[Block]:
    num_queries = q.shape[1] // shape[2]
    for start in range(0, num_queries, BLOCK):
        yield _block(q, k, shape, range(start, min(start + BLOCK, num_queries)), visibility, scoring)


def _weights(
    q: Tensor, k: Tensor, block: Block, visibility: Visibility, scoring: Scoring, weighing: Weighing
) -> _Weights:
    """Weights of folded q [B·K, P·G, H] and k [B·K, C, H], differentiable. Hidden scores are so low that σ is 0."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = block.unfold(products(q, k, block, scoring).to(wide) * scoring.scale)
    for first, last, amounts in block.penalties:
        scores[..., first:last] -= amounts
    if weighing.bias is None:
        seen_BP = visible_keys(visibility, block, k.device).clamp_min(1)
        scores = scores - seen_BP.to(wide).log()[:, None, :, None, None]
    else:
        scores = scores + weighing.bias
    if weighing.bias_N is not None:
        scores = scores + weighing.bias_N.to(wide).view(1, block.num_kv_heads, 1, block.group, 1)
    p = torch.sigmoid(scores).flatten(2, 3).flatten(0, 1)
    return _Weights(p, p.sum(-1, keepdim=True) + NORMALIZER_EPS if weighing.normalize else p.new_ones(1, 1, 1))


def visible_keys(visibility: Visibility, block: Block, device: torch.device) -> Tensor:
    """[1 or B, P] int64: how many keys each query of a block sees."""
    seen = visibility.block(block.start, block.end, block.first, block.last, device)
    if seen is None:
        return torch.full((1, block.end - block.start), block.last - block.first, device=device)
    return seen.sum(-1)


@torch.library.custom_op("graft::sigmoid_attention", mutates_args=())
def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_bias: Tensor | None,
    batch: int,
    group: int,
    causal: bool,
    window: int | None,
    offset: int,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    scale: float,
    slopes: Tensor | None,
    rates: Tensor | None,
    bias: float | None,
    normalize: bool,
) -> Tensor:
    """[B·K, T·G, H] folded queries, [B·K, S, H] keys, values [B·K, S, any width] to [B·K, T·G, that width]."""
    visibility = Visibility(causal, window, offset, query_segments, key_segments)
    scoring, weighing = Scoring(scale, slopes_N=slopes, rates_H=rates), Weighing(bias, head_bias, normalize)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for block in _blocks(q, k, (batch, q.shape[0] // batch, group), visibility, scoring):
        w = _weights(q[:, block.rows], k[:, block.keys], block, visibility, scoring, weighing)
        out[:, block.rows] = torch.bmm(w.p.to(v.dtype), v[:, block.keys]) / w.total
    return out


@torch.library.custom_op("graft::sigmoid_attention_backward", mutates_args=())
def _banded_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_bias: Tensor | None,
    batch: int,
    group: int,
    causal: bool,
    window: int | None,
    offset: int,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    scale: float,
    slopes: Tensor | None,
    rates: Tensor | None,
    bias: float | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of each head's bias ([N], whether it has one or not), summed in fp32 at least."""
    visibility = Visibility(causal, window, offset, query_segments, key_segments)
    scoring, weighing = Scoring(scale, slopes_N=slopes, rates_H=rates), Weighing(bias, head_bias, normalize)
    wide = torch.promote_types(k.dtype, torch.float32)
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    num_kv_heads = q.shape[0] // batch
    d_bias = q.new_zeros(num_kv_heads, group, dtype=wide)
    for block in _blocks(q, k, (batch, num_kv_heads, group), visibility, scoring):
        rows, keys = block.rows, block.keys
        q_rows, d_rows, k_cols, v_cols = q[:, rows], d_out[:, rows], k[:, keys], v[:, keys]
        w = _weights(q_rows, k_cols, block, visibility, scoring, weighing)
        d_v[:, keys] += torch.bmm((w.p / w.total).to(v.dtype).transpose(1, 2), d_rows)
        d_p = torch.bmm(d_rows, v_cols.transpose(1, 2)).to(wide)
        if normalize:  # a weight also lowers the others' shares
            d_p = (d_p - (d_p * w.p).sum(-1, keepdim=True) / w.total) / w.total
        d_scores = d_p * w.p * (1 - w.p)
        d_bias += block.unfold(d_scores).sum((0, 2, 4))
        d_q[:, rows], d_k_cols = _operand_gradients((d_scores * scale).to(q.dtype), q_rows, k_cols, block, scoring)
        d_k[:, keys] += d_k_cols
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_bias.flatten()


def _operand_gradients(
    d_products: Tensor, q: Tensor, k: Tensor, block: Block, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and keys of one block from those of their products."""
    if scoring.rates_H is None:
        return torch.bmm(d_products, k), torch.bmm(d_products.transpose(1, 2), q)
    place = (block.group, block.start + block.offset, block.first, block.causal)
    return decayed_products_backward(d_products, q, k, scoring.rates_H, *place)


@_banded.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])


@_banded_backward.register_fake
def _(
    _d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, _head_bias: Tensor | None, batch: int, group: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = q.new_empty(q.shape[0] // batch * group, dtype=torch.promote_types(k.dtype, torch.float32))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `_banded`'s arguments; all but q, k, v and the heads' bias are constants."""
    arguments = kept_arguments(ctx)
    *d_qkv, d_bias = _banded_backward(d_out.contiguous(), *arguments)
    head_bias: Tensor | None = arguments[3]
    d_head_bias = None if head_bias is None else d_bias.to(head_bias.dtype)
    return *d_qkv, d_head_bias, *(None,) * (len(arguments) - 4)


_banded.register_autograd(_backward, setup_context=keep_arguments)


@register_flop_formula(torch.ops.graft.sigmoid_attention)
def _forward_flops(q: Any, k: Any, v: Any, _head_bias: Any, *settings: Any, **_: Any) -> int:
    """For PyTorch's FLOP counter: scores and outputs."""
    return pair_flops(1, 1, q, k, v, *settings)


@register_flop_formula(torch.ops.graft.sigmoid_attention_backward)
def _backward_flops(_d_out: Any, q: Any, k: Any, v: Any, _head_bias: Any, *settings: Any, **_: Any) -> int:
    """For PyTorch's FLOP counter: scores again, and the gradients of v, weights, q and k."""
    return pair_flops(3, 2, q, k, v, *settings)
