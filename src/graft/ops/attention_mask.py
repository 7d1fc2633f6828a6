"""Which keys a query sees, as arithmetic on indices: any block of the mask is made alone, never the whole one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Query t, whose index among the keys is i = t + offset, sees key j when every rule that is on allows it.

    Args:
        causal: j ≤ i.
        window: |i − j| < window (so a query counts itself); None = no limit.
        offset: index of query 0 among the keys.
        query_segments_BT: document numbers; equal to the key's, and not 0. None = no such rule.
        key_segments_BS: document numbers of the keys; None together with the queries'.
    """

    causal: bool
    window: int | None
    offset: int
    query_segments_BT: Tensor | None = None
    key_segments_BS: Tensor | None = None

    def key_range(self, start: int, end: int, num_keys: int) -> tuple[int, int]:
        """The half-open range of keys that any of the queries [start, end) may see."""
        first, last = 0, num_keys
        if self.window is not None:
            first = max(0, self.offset + start - self.window + 1)
            last = min(last, self.offset + end - 1 + self.window)
        if self.causal:
            last = min(last, self.offset + end)
        return min(first, max(last, 0)), max(last, 0)

    def block(self, start: int, end: int, first: int, last: int, device: torch.device) -> Tensor | None:
        """[1 or B, P, C] bool of queries [start, end) against keys [first, last); None when all of it is visible."""
        seen: Tensor | None = None
        if self._limits(start, end, first, last):
            queries = torch.arange(start + self.offset, end + self.offset, device=device)[:, None]
            keys = torch.arange(first, last, device=device)[None, :]
            ahead = keys - queries
            seen = ahead <= 0 if self.causal else None
            if self.window is not None:
                near = ahead > -self.window if self.causal else ahead.abs() < self.window
                seen = near if seen is None else seen & near
            assert seen is not None
            seen = seen[None]
        if self.query_segments_BT is not None:
            assert self.key_segments_BS is not None
            queries = self.query_segments_BT[:, start:end, None]
            same = (queries == self.key_segments_BS[:, None, first:last]) & (queries != 0)
            seen = same if seen is None else seen & same
        return seen

    def _limits(self, start: int, end: int, first: int, last: int) -> bool:
        """Whether an index rule hides anything in the block."""
        if self.causal and last - 1 > start + self.offset:
            return True
        if self.window is None:
            return False
        behind = end - 1 + self.offset - first
        ahead = last - 1 - (start + self.offset)
        return behind >= self.window or (not self.causal and ahead >= self.window)


def distances(offset: int, start: int, end: int, first: int, last: int, device: torch.device) -> Tensor:
    """[P, C] fp32: |i − j| between queries [start, end) and keys [first, last)."""
    queries = torch.arange(start + offset, end + offset, dtype=torch.float32, device=device)[:, None]
    return (queries - torch.arange(first, last, dtype=torch.float32, device=device)).abs()
