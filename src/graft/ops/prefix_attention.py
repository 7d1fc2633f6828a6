"""Softmax attention beside a few keys that every query sees, in windows: time linear in the length."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_mask import Visibility, distances
from graft.ops.attention_reference import faded_products
from graft.ops.decayed_products import decayed_products
from graft.ops.kernels import Kernels


class Nearness(NamedTuple):
    """What distance does to scores (see `graft.positions.base.AttentionPosition`), and which query stands where.

    Args:
        slopes_N: the penalty per unit of distance; None = none.
        rates_H: rates ≥ 0 at which channels of q·k fade with distance; None = none does.
        first_query: index of query 0 among the keys.
        copies: the keys are so many stretches of equal indices, one after the other.
        causal: no query sees a key after it, so that what distance does to such a pair need not be known.
    """

    slopes_N: Tensor | None = None
    rates_H: Tensor | None = None
    first_query: int = 0
    copies: int = 1
    causal: bool = True


ANYWHERE = Nearness()
"""Distance does nothing."""


class Prefix(NamedTuple):
    """Keys and values seen by every query, at distance 0 from all.

    Args:
        k_PNH: keys, P of them (0 = none).
        v_PNH: values, alike.
    """

    k_PNH: Tensor
    v_PNH: Tensor


def prefix_attention(
    q_BTNH: Tensor,
    k_BSNH: Tensor,
    v_BSNH: Tensor,
    prefix: Prefix,
    *,
    scale: float,
    seen_BTS: Tensor,
    nearness: Nearness = ANYWHERE,
    kernels: Kernels = "auto",
) -> Tensor:
    """``softmax([scale·q·k_prefix, scale·q·k − slope·distance]) [v_prefix, v]``: the definition, all pairs at once.
    With rates, channel c of q·k is multiplied by ``e^(−rate_c·distance)``.

    Args:
        q_BTNH: queries.
        k_BSNH: keys, as many heads.
        v_BSNH: values.
        prefix: keys and values every query sees.
        scale: factor on q·k.
        seen_BTS: bool [1 or B, T, S], which keys a query sees.
        nearness: what distance does; where it is causal, keys after their query must not be seen.
        kernels: ``reference`` fades channel by channel.

    Returns:
        [B, T, N, H] in the dtype of v; zeros where a query sees no key at all.
    """
    B, P = q_BTNH.shape[0], prefix.k_PNH.shape[0]
    first_k, first_v = (x.to(k_BSNH.dtype).transpose(0, 1) for x in prefix)  # [N, P, H]
    near, apart_TS = _near_products(q_BTNH, k_BSNH, nearness, kernels)
    scores = torch.cat((q_BTNH.transpose(1, 2) @ first_k.transpose(-1, -2), near), dim=-1) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if nearness.slopes_N is not None:
        penalty_NTS = nearness.slopes_N[:, None, None] * apart_TS
        scores = scores - F.pad(penalty_NTS, (P, 0)).to(scores.dtype)
    v = torch.cat((first_v.expand(B, -1, -1, -1), v_BSNH.transpose(1, 2)), dim=2)
    seen = F.pad(seen_BTS, (P, 0), value=True)[:, None]
    # a finite filler: a row that sees nothing gets no NaN in its gradient either
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _near_products(q_BTNH: Tensor, k_BSNH: Tensor, nearness: Nearness, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """q·k [B, N, T, S], faded where there are rates; and how far apart the pairs are, [T, S]."""
    T, S = q_BTNH.shape[1], k_BSNH.shape[1] // nearness.copies
    apart_TS = distances(nearness.first_query, 0, T, 0, S, q_BTNH.device).repeat(1, nearness.copies)
    q_BNTH, rates_H = q_BTNH.transpose(1, 2), nearness.rates_H
    if rates_H is None:
        return q_BNTH @ k_BSNH.transpose(1, 2).transpose(-1, -2), apart_TS
    if kernels == "reference":
        wide = torch.promote_types(q_BTNH.dtype, torch.float32)
        faded = faded_products(q_BTNH.to(wide), k_BSNH.to(wide), apart_TS.to(wide), rates_H)
        return faded.to(q_BTNH.dtype), apart_TS
    folded = q_BNTH.flatten(0, 1).contiguous()
    stretches = k_BSNH.to(q_BTNH.dtype).transpose(1, 2).flatten(0, 1).chunk(nearness.copies, dim=1)
    first, causal = nearness.first_query, nearness.causal
    faded = [decayed_products(folded, k.contiguous(), rates_H, 1, first, 0, causal) for k in stretches]
    return torch.cat(faded, dim=-1).unflatten(0, q_BNTH.shape[:2]), apart_TS


def window_attention(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNH: Tensor,
    prefix: Prefix,
    *,
    scale: float,
    window: int,
    segment_ids_BT: Tensor | None,
    nearness: Nearness = ANYWHERE,
    causal: bool = True,
    kernels: Kernels = "auto",
) -> Tensor:
    """`prefix_attention` to the last ``window`` positions of the query's own document, itself included; when not
    causal, to the next ``window`` likewise.

    ``auto`` cuts the row into blocks of ``window`` queries, each of which sees keys of its own block and of the one
    before (and after); ``reference`` makes all pairs. Arguments as in `prefix_attention`, where ``causal`` and the
    window say what is seen and which query stands where; segment 0 is padding; None = one document.
    """
    B, T = q_BTNH.shape[:2]
    if kernels == "reference" or window >= T:
        visibility = Visibility(causal, window, 0, segment_ids_BT, segment_ids_BT)
        seen = visibility.block(0, T, 0, T, q_BTNH.device)
        assert seen is not None
        nearness = nearness._replace(first_query=0, causal=causal)
        return prefix_attention(
            q_BTNH, k_BTNH, v_BTNH, prefix, scale=scale, seen_BTS=seen, nearness=nearness, kernels=kernels
        )
    blocks = -(-T // window)
    extra = blocks * window - T
    q = F.pad(q_BTNH, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, window))
    k, v = (
        _with_neighbours(F.pad(x, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, window)), causal)
        for x in (k_BTNH, v_BTNH)
    )
    seen = _seen_in_blocks(B, T, blocks, window, segment_ids_BT, q_BTNH.device, causal)
    out = prefix_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        prefix,
        scale=scale,
        seen_BTS=seen.flatten(0, 1),
        nearness=nearness._replace(first_query=window, causal=causal),
    )
    return out.unflatten(0, (B, blocks)).flatten(1, 2)[:, :T]


def _with_neighbours(x: Tensor, causal: bool) -> Tensor:
    """[B, X, W, …] to [B, X, 2 W or 3 W, …]: each block behind the one before it and, when not causal, before the one
    after it; zeros beyond the first and the last.
    """
    nothing = torch.zeros_like(x[:, :1])
    before = torch.cat((nothing, x[:, :-1]), dim=1)
    if causal:
        return torch.cat((before, x), dim=2)
    return torch.cat((before, x, torch.cat((x[:, 1:], nothing), dim=1)), dim=2)


def _seen_in_blocks(
    B: int, T: int, blocks: int, window: int, segment_ids_BT: Tensor | None, device: torch.device, causal: bool
) -> Tensor:
    """[B, X, W, 2 W or 3 W] bool: which neighbouring keys each query sees. Document 0 stands before the row and after
    it.
    """
    if segment_ids_BT is None:
        segment_ids_BT = torch.ones((1, 1), dtype=torch.int64, device=device).expand(B, T)
    ids = F.pad(segment_ids_BT, (0, blocks * window - T)).unflatten(1, (blocks, window))
    keys = _with_neighbours(ids, causal)
    band = Visibility(causal, window, window).block(0, window, 0, keys.shape[2], device)
    assert band is not None
    same = ids[..., None] == keys[:, :, None]
    return band & same & (ids != 0)[..., None]
