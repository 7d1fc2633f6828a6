"""Attention as two batched matrix products, the query heads of one key head stacked as rows.

Keys and values are never repeated for grouped queries: batch element (b, k) multiplies the rows (t, g) of its G query
heads with one [S, H] matrix. Best for short sequences on a CPU; the block-wise kernel uses it per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_mask import Scoring, Visibility, distances
from graft.ops.decayed_products import decayed_products


class Penalty(NamedTuple):
    """What a stretch of keys loses in the scores of a block.

    Args:
        first, last: keys, counted from the block's first.
        amounts: [B or 1, K or 1, P, G or 1, C] subtracted from the scores: distance terms; half of the dtype's largest
            number where the key is hidden (which leaves exactly nothing of it after the softmax, and stays finite).
    """

    first: int
    last: int
    amounts: Tensor


@dataclass(frozen=True)
class Block:
    """Queries [start, end) against keys [first, last).

    Args:
        batch, num_kv_heads, group: B, K, G, to find them again in folded tensors.
        start, end: queries.
        first, last: keys.
        offset, causal: as in `Visibility`.
        penalties: subtracted from the scores; keys in none of them lose nothing.
        hidden: [1 or B, 1, P, 1, C] pairs whose probability is set to 0, when some query may see no key; else None.
    """

    batch: int
    num_kv_heads: int
    group: int
    start: int
    end: int
    first: int
    last: int
    offset: int
    causal: bool
    penalties: tuple[Penalty, ...]
    hidden: Tensor | None

    @property
    def keys(self) -> slice:
        """The block's keys."""
        return slice(self.first, self.last)

    @property
    def rows(self) -> slice:
        """The rows of folded queries that the block covers."""
        return slice(self.start * self.group, self.end * self.group)

    def unfold(self, x: Tensor) -> Tensor:
        """[B·K, P·G, C] seen as [B, K, P, G, C]."""
        return x.view(self.batch, self.num_kv_heads, self.end - self.start, self.group, x.shape[-1])


def make_block(
    visibility: Visibility, scoring: Scoring, shape: tuple[int, int, int], queries: range, num_keys: int, like: Tensor
) -> Block:
    """The block of some queries with every key that any of them may see.

    Args:
        visibility: the mask.
        scoring: gives the slopes.
        shape: (B, K, G).
        queries: the query indices.
        num_keys: S.
        like: gives the device, and the dtype of penalties.
    """
    start, end = queries.start, queries.stop
    first, last = visibility.key_range(start, end, num_keys)
    stretches = [(first, last)]
    if scoring.slopes_N is None and visibility.query_segments_BT is None:
        common_first, common_last = visibility.common_range(start, end, num_keys)
        common = common_last - common_first
        if common > 0 and 2 * common >= last - first:  # cutting the scores up and joining them costs, too
            stretches = [(first, common_first), (common_last, last)]
    penalties = tuple(
        Penalty(a - first, b - first, amounts)
        for a, b in stretches
        if a < b and (amounts := _amounts(visibility, scoring, shape, (start, end, a, b), like)) is not None
    )
    hidden = None
    if not visibility.sees_something(end, num_keys):
        seen = visibility.block(start, end, first, last, like.device)
        hidden = None if seen is None else ~seen[:, None, :, None, :]
    return Block(*shape, start, end, first, last, visibility.offset, visibility.causal, penalties, hidden)


def _amounts(
    visibility: Visibility,
    scoring: Scoring,
    shape: tuple[int, int, int],
    where: tuple[int, int, int, int],  # plain numbers: a range of keys would be compiled anew for every length
    like: Tensor,
) -> Tensor | None:
    """The penalty of some keys (see `Penalty`), ``where`` = first query and end, first key and end; None = none."""
    seen = visibility.block(*where, like.device)
    amounts = None
    if scoring.slopes_N is not None:
        wide = torch.promote_types(like.dtype, torch.float32)
        slopes = scoring.slopes_N.to(wide).view(1, shape[1], 1, shape[2], 1)
        away = distances(visibility.offset, *where, like.device)
        amounts = (slopes * away[None, None, :, None, :]).to(like.dtype)
    if seen is None:
        return amounts
    none = amounts if amounts is not None else torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(seen[:, None, :, None, :], none, torch.finfo(like.dtype).max / 2)


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


def products(q: Tensor, k: Tensor, block: Block, scoring: Scoring) -> Tensor:
    """[B·K, P·G, C]: q·k of folded q [B·K, P·G, H] and k [B·K, C, H], faded with distance where there are rates."""
    if scoring.rates_H is None:
        return torch.bmm(q, k.transpose(1, 2))
    return decayed_products(q, k, scoring.rates_H, block.group, block.start + block.offset, block.first, block.causal)


def probabilities(q: Tensor, k: Tensor, block: Block, scoring: Scoring) -> Tensor:
    """[B·K, P·G, C] attention probabilities of folded q [B·K, P·G, H] and k [B·K, C, H], differentiable.

    The softmax works in fp32 inside whatever the dtype; hidden pairs get exactly 0, also in rows that see nothing.
    """
    scores = products(q, k, block, scoring) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    for first, last, amounts in block.penalties:
        if last - first == scores.shape[-1]:
            scores = (block.unfold(scores) - amounts).view_as(scores)
        else:
            part = block.unfold(scores[..., first:last].contiguous()) - amounts
            scores = torch.cat((scores[..., :first], part.flatten(2, 3).flatten(0, 1), scores[..., last:]), dim=-1)
    p = torch.softmax(scores, dim=-1)
    return p if block.hidden is None else block.unfold(p).masked_fill(block.hidden, 0.0).view_as(p)


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
    p = probabilities(q, k[:, block.keys], block, scoring)
    return unfold_queries(torch.bmm(F.dropout(p, dropout), v[:, block.keys]), B, N)
