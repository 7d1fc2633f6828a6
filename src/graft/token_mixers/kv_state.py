"""The keys and values a decoding attention layer keeps: all of them, or a ring of the last ``window``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graft.ops.attention_mask import Visibility


class KVState(NamedTuple):
    """Keys and values of one layer. Updated in place: the one passed to `extend` is consumed.

    Args:
        k_BKSH: [B, K, capacity, H] keys, positions worked in; the key of index i is in slot i mod capacity.
        v_BKSH: values, alike.
        segments_BS: document numbers per slot, kept from the first call that has some; None = one document, no padding.
        length: positions seen so far.
    """

    k_BKSH: Tensor
    v_BKSH: Tensor
    segments_BS: Tensor | None
    length: int


class Keys(NamedTuple):
    """What the new queries attend to.

    Args:
        k_BSKH: keys in order of position, or in any order when ``all_seen``.
        v_BSKH: values, alike.
        segments_BS: their document numbers, if any were ever given.
        query_segments_BT: those of the new queries, alike.
        offset: index of the first new query among the keys.
        all_seen: neither causality nor the window hides any of them from the (single) query.
    """

    k_BSKH: Tensor
    v_BSKH: Tensor
    segments_BS: Tensor | None
    query_segments_BT: Tensor | None
    offset: int
    all_seen: bool = False


def visibility_of(keys: Keys, window: int | None) -> Visibility:
    """Which of the keys the new queries see, with the layer's sliding window; decoding is causal."""
    segments = (keys.query_segments_BT, keys.segments_BS)
    return Visibility(not keys.all_seen, None if keys.all_seen else window, keys.offset, *segments)


def empty_state(
    batch_size: int, num_kv_heads: int, capacity: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> KVState:
    """A state before the first position."""
    shape = (batch_size, num_kv_heads, capacity, head_dim)
    k_BKSH, v_BKSH = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    return KVState(k_BKSH, v_BKSH, None, 0)


def extend(
    state: KVState,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    segments_BT: Tensor | None,
    *,
    window: int | None,
    any_order: bool,
) -> tuple[Keys, KVState]:
    """Adds T positions; gives the keys that their queries may see, and the new state.

    Args:
        state: the state so far.
        k_BTKH: keys of the new positions.
        v_BTKH: values of the new positions.
        segments_BT: their document numbers; None = document 1.
        window: the layer's sliding window; None = all keys stay visible.
        any_order: the caller does not need distances, so that one query may read a full ring without unrolling it.
    """
    T, seen = k_BTKH.shape[1], state.length
    capacity = state.k_BKSH.shape[2]
    rolls = window is not None and window == capacity
    assert rolls or seen + T <= capacity, f"{seen} + {T} positions do not fit a state of {capacity}"
    segments_BS = _segment_slots(state, segments_BT)
    new_segments_BT = segments_BT
    if segments_BS is not None and segments_BT is None:
        new_segments_BT = segments_BS.new_ones((1, 1)).expand(k_BTKH.shape[0], T)
    after = KVState(state.k_BKSH, state.v_BKSH, segments_BS, seen + T)
    new = (k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2), new_segments_BT)

    if not rolls or seen + T <= capacity:
        _write(after, new, seen)
        return _as_they_lie(after, seen + T, new_segments_BT, offset=seen), after
    if T == 1 and any_order:
        _write(after, new, seen)
        return _as_they_lie(after, capacity, new_segments_BT, offset=capacity - 1)._replace(all_seen=True), after
    kept = min(seen, capacity - 1)  # what the first new query sees beside itself
    old = _unrolled(after, seen - kept, seen)
    k_BKSH, v_BKSH = (torch.cat((a, b.to(a.dtype)), dim=2) for a, b in zip(old[:2], new[:2], strict=True))
    segments = None
    if old[2] is not None and new_segments_BT is not None:
        segments = torch.cat((old[2], new_segments_BT.to(old[2].dtype)), dim=1)
    _write(after, new, seen)
    return Keys(k_BKSH.transpose(1, 2), v_BKSH.transpose(1, 2), segments, new_segments_BT, kept), after


_Parts = tuple[Tensor, Tensor, Tensor | None]
"""Keys [B, K, ·, H], values [B, K, ·, H], segments [B, ·]."""


def _segment_slots(state: KVState, segments_BT: Tensor | None) -> Tensor | None:
    """The segments per slot; what came before the first given ones was document 1."""
    if state.segments_BS is not None or segments_BT is None:
        return state.segments_BS
    return segments_BT.new_ones((state.k_BKSH.shape[0], state.k_BKSH.shape[2]))


def _slices(start: int, end: int, capacity: int) -> list[slice]:
    """The slots of indices [start, end), at most ``capacity`` of them, in order."""
    first, count = start % capacity, end - start
    head = slice(first, min(first + count, capacity))
    rest = count - (head.stop - head.start)
    return [head] if rest == 0 else [head, slice(0, rest)]


def _write(state: KVState, new: _Parts, start: int) -> None:
    """Puts new positions, the first of them with index ``start``, into their slots; a ring keeps the last ones."""
    capacity, count = state.k_BKSH.shape[2], new[0].shape[2]
    source = max(0, count - capacity)
    for slots in _slices(start + source, start + count, capacity):
        piece = slice(source, source + slots.stop - slots.start)
        state.k_BKSH[:, :, slots] = new[0][:, :, piece].to(state.k_BKSH.dtype)
        state.v_BKSH[:, :, slots] = new[1][:, :, piece].to(state.v_BKSH.dtype)
        if state.segments_BS is not None:
            assert new[2] is not None
            state.segments_BS[:, slots] = new[2][:, piece].to(state.segments_BS.dtype)
        source = piece.stop


def _unrolled(state: KVState, start: int, end: int) -> _Parts:
    """Copies of what is kept for indices [start, end), in order."""
    pieces = _slices(start, end, state.k_BKSH.shape[2])
    k_BKSH = torch.cat([state.k_BKSH[:, :, s] for s in pieces], dim=2)
    v_BKSH = torch.cat([state.v_BKSH[:, :, s] for s in pieces], dim=2)
    segments_BS = state.segments_BS
    return k_BKSH, v_BKSH, None if segments_BS is None else torch.cat([segments_BS[:, s] for s in pieces], dim=1)


def _as_they_lie(state: KVState, count: int, query_segments_BT: Tensor | None, *, offset: int) -> Keys:
    """The first slots, without a copy."""
    segments_BS = None if state.segments_BS is None else state.segments_BS[:, :count]
    k_BSKH, v_BSKH = (x[:, :, :count].transpose(1, 2) for x in (state.k_BKSH, state.v_BKSH))
    return Keys(k_BSKH, v_BSKH, segments_BS, query_segments_BT, offset)
