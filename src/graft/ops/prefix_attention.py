"""Softmax attention beside a few keys that every query sees, in windows: time linear in the length."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.attention_mask import Visibility, distances


class Prefix(NamedTuple):
    """Keys and values without positions, seen by every query.

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
    slopes_N: Tensor | None = None,
    distances_TS: Tensor | None = None,
) -> Tensor:
    """``softmax([scale·q·k_prefix, scale·q·k − slope·distance]) [v_prefix, v]``: the definition, all pairs at once.

    Args:
        q_BTNH: queries.
        k_BSNH: keys, as many heads.
        v_BSNH: values.
        prefix: keys and values every query sees.
        scale: factor on q·k.
        seen_BTS: bool [1 or B, T, S], which keys a query sees.
        slopes_N: the penalty per unit of distance; None = none.
        distances_TS: how far apart queries and keys are; given with ``slopes_N``.

    Returns:
        [B, T, N, H] in the dtype of v; zeros where a query sees no key at all.
    """
    B, P = q_BTNH.shape[0], prefix.k_PNH.shape[0]
    k, v = (
        torch.cat((x_PNH[None].expand(B, -1, -1, -1).to(x_BSNH.dtype), x_BSNH), dim=1).transpose(1, 2)
        for x_PNH, x_BSNH in ((prefix.k_PNH, k_BSNH), (prefix.v_PNH, v_BSNH))
    )
    scores = (q_BTNH.transpose(1, 2) @ k.transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if slopes_N is not None:
        assert distances_TS is not None
        penalty_NTS = slopes_N[:, None, None] * distances_TS
        scores = scores - F.pad(penalty_NTS, (P, 0)).to(scores.dtype)
    seen = F.pad(seen_BTS, (P, 0), value=True)[:, None]
    # a finite filler: a row that sees nothing gets no NaN in its gradient either
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def window_attention(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNH: Tensor,
    prefix: Prefix,
    *,
    scale: float,
    window: int,
    segment_ids_BT: Tensor | None,
    slopes_N: Tensor | None = None,
    kernels: Literal["auto", "reference"] = "auto",
) -> Tensor:
    """Causal `prefix_attention` to the last ``window`` positions of the query's own document, itself included.

    ``auto`` cuts the row into blocks of ``window`` queries, each of which sees keys of its own block and of the one
    before; ``reference`` makes all pairs. Arguments as in `prefix_attention`; segment 0 is padding; None = one
    document.
    """
    B, T = q_BTNH.shape[:2]
    if kernels == "reference" or window >= T:
        visibility = Visibility(True, window, 0, segment_ids_BT, segment_ids_BT)
        seen = visibility.block(0, T, 0, T, q_BTNH.device)
        assert seen is not None
        apart = distances(0, 0, T, 0, T, q_BTNH.device)
        return prefix_attention(
            q_BTNH, k_BTNH, v_BTNH, prefix, scale=scale, seen_BTS=seen, slopes_N=slopes_N, distances_TS=apart
        )
    blocks = -(-T // window)
    extra = blocks * window - T
    q = F.pad(q_BTNH, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, window))
    k, v = (
        _with_block_before(F.pad(x, (0, 0, 0, 0, 0, extra)).unflatten(1, (blocks, window))) for x in (k_BTNH, v_BTNH)
    )
    seen = _seen_in_blocks(B, T, blocks, window, segment_ids_BT, q_BTNH.device)
    out = prefix_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        prefix,
        scale=scale,
        seen_BTS=seen.flatten(0, 1),
        slopes_N=slopes_N,
        distances_TS=distances(window, 0, window, 0, 2 * window, q_BTNH.device),
    )
    return out.unflatten(0, (B, blocks)).flatten(1, 2)[:, :T]


def _with_block_before(x: Tensor) -> Tensor:
    """[B, X, W, …] to [B, X, 2 W, …]: each block after the one before it, zeros before the first."""
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    return torch.cat((before, x), dim=2)


def _seen_in_blocks(
    B: int, T: int, blocks: int, window: int, segment_ids_BT: Tensor | None, device: torch.device
) -> Tensor:
    """[B, X, W, 2 W] bool: which of two blocks' keys each query sees. Document 0 stands before the row and after it."""
    if segment_ids_BT is None:
        segment_ids_BT = torch.ones((1, 1), dtype=torch.int64, device=device).expand(B, T)
    ids = F.pad(segment_ids_BT, (0, blocks * window - T)).unflatten(1, (blocks, window))
    band = Visibility(True, window, window).block(0, window, 0, 2 * window, device)
    assert band is not None
    same = ids[..., None] == _with_block_before(ids)[:, :, None]
    return band & same & (ids != 0)[..., None]
