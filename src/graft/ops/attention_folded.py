"""Attention as two batched matrix products, the query heads of one key head stacked as rows.

Keys and values are never repeated for grouped queries: batch element (b, k) multiplies the rows (t, g) of its G query
heads with one [S, H] matrix. Best for short sequences on a CPU; the block-wise kernel uses it per block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_mask import Visibility, distances


@dataclass(frozen=True)
class Scoring:
    """How q·k becomes a score: ``cap(scale·q·k) − slope·|i − j|``.

    Args:
        scale: factor on q·k.
        softcap: c in c·tanh(x/c); None = no cap.
        slopes_N: [N] constants per query head; None = no distance term.
    """

    scale: float
    softcap: float | None = None
    slopes_N: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Queries [start, end) against keys [first, last), with what they may see of each other.

    Args:
        batch, num_kv_heads, group: B, K, G, to find them again in folded tensors.
        start, end: query rows.
        first, last: keys.
        seen: [1 or B, P, C] bool; None = all is visible.
        bias: [1, K, P, G, C] subtracted from the scores; None = nothing.
    """

    batch: int
    num_kv_heads: int
    group: int
    start: int
    end: int
    first: int
    last: int
    seen: Tensor | None
    bias: Tensor | None

    def unfold(self, x: Tensor) -> Tensor:
        """[B·K, P·G, C] seen as [B, K, P, G, C]."""
        return x.view(self.batch, self.num_kv_heads, self.end - self.start, self.group, x.shape[-1])


def make_block(
    visibility: Visibility, scoring: Scoring, shape: tuple[int, int, int], queries: range, num_keys: int, like: Tensor
) -> Block:
    """The block of some queries with every key they may see.

    Args:
        visibility: the mask.
        scoring: gives the slopes.
        shape: (B, K, G).
        queries: the query rows.
        num_keys: S.
        like: gives the device, and the dtype of the bias.
    """
    batch, num_kv_heads, group = shape
    first, last = visibility.key_range(queries.start, queries.stop, num_keys)
    seen = visibility.block(queries.start, queries.stop, first, last, like.device)
    bias = None
    if scoring.slopes_N is not None:
        away = distances(visibility.offset, queries.start, queries.stop, first, last, like.device)
        slopes = scoring.slopes_N.view(1, num_kv_heads, 1, group, 1)
        bias = (slopes * away[None, None, :, None, :]).to(like.dtype)
    return Block(batch, num_kv_heads, group, queries.start, queries.stop, first, last, seen, bias)


def fold_queries(q_BTNH: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, N, H] to [B·K, T·G, H]: row t·G + g is query t of the g-th head of its group."""
    B, T, N, H = q_BTNH.shape
    group = N // num_kv_heads
    return q_BTNH.view(B, T, num_kv_heads, group, H).transpose(1, 2).reshape(B * num_kv_heads, T * group, H)


def fold_keys(k_BSKH: Tensor) -> Tensor:
    """[B, S, K, H] to [B·K, S, H]; no copy when memory is already ordered [B, K, S, H]."""
    B, S, K, H = k_BSKH.shape
    return k_BSKH.transpose(1, 2).reshape(B * K, S, H)


def unfold_queries(o: Tensor, batch: int, num_heads: int) -> Tensor:
    """[B·K, T·G, H] back to [B, T, N, H]."""
    num_kv_heads, H = o.shape[0] // batch, o.shape[-1]
    group = num_heads // num_kv_heads
    return o.view(batch, num_kv_heads, -1, group, H).transpose(1, 2).reshape(batch, -1, num_heads, H)


def probabilities(q: Tensor, k: Tensor, block: Block, scoring: Scoring) -> Tensor:
    """[B·K, P·G, C] attention probabilities of folded q [B·K, P·G, H] and k [B·K, C, H], differentiable.

    The softmax works in fp32 inside whatever the dtype; hidden pairs get exactly 0, also in rows that see nothing.
    """
    scores = torch.bmm(q, k.transpose(1, 2)) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if block.bias is not None:
        scores = (block.unfold(scores) - block.bias).view_as(scores)
    if block.seen is None:
        return torch.softmax(scores, dim=-1)
    hidden = ~block.seen[:, None, :, None, :]
    scores = block.unfold(scores).masked_fill(hidden, torch.finfo(scores.dtype).min).view_as(scores)
    return block.unfold(torch.softmax(scores, dim=-1)).masked_fill(hidden, 0.0).view_as(scores)


def folded_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring, *, dropout: float
) -> Tensor:
    """Attention over one block that holds every query: O(T·S) memory. Arguments as in `graft.ops.attention.attention`.

    Returns:
        [B, T, N, H] in the dtype of q.
    """
    B, T, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    block = make_block(visibility, scoring, (B, K, N // K), range(T), k_BSKH.shape[1], q_BTNH)
    q, k, v = fold_queries(q_BTNH, K), fold_keys(k_BSKH), fold_keys(v_BSKH)
    p = probabilities(q, k[:, block.first : block.last], block, scoring)
    return unfold_queries(torch.bmm(F.dropout(p, dropout), v[:, block.first : block.last]), B, N)
