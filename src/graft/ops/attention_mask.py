"""What attention is asked for: which keys a query sees, and how q·k becomes a score.

Visibility is arithmetic on indices, so that any block of the mask can be made alone and never needs the whole.
"""

from __future__ import annotations

import functools
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
        query_segments_BT: document numbers of the queries, 0 = padding: equal to the key's, and not 0. None = no such
            rule.
        key_segments_BS: document numbers of the keys; None together with the queries'.
    """

    causal: bool
    window: int | None = None
    offset: int = 0
    query_segments_BT: Tensor | None = None
    key_segments_BS: Tensor | None = None

    def without_idle_window(self, num_queries: int, num_keys: int) -> Visibility:
        """The same without a window that hides nothing: none of the pairs is so far apart."""
        if self.window is None or self.window < max(num_queries + self.offset, num_keys - self.offset):
            return self
        return Visibility(self.causal, None, self.offset, self.query_segments_BT, self.key_segments_BS)

    def key_range(self, start: int, end: int, num_keys: int) -> tuple[int, int]:
        """The half-open range of keys that any of the queries [start, end) may see."""
        first, last = 0, num_keys
        if self.window is not None:
            first = max(0, self.offset + start - self.window + 1)
            last = min(last, self.offset + end - 1 + self.window)
        if self.causal:
            last = min(last, self.offset + end)
        return min(first, max(last, 0)), max(last, 0)

    def common_range(self, start: int, end: int, num_keys: int) -> tuple[int, int]:
        """The half-open range of keys that *all* queries [start, end) see by the index rules; (0, 0) when none."""
        first, last = 0, num_keys
        if self.window is not None:
            first = max(0, self.offset + end - self.window)
            last = min(last, self.offset + start + self.window)
        if self.causal:
            last = min(last, self.offset + start + 1)
        return (first, last) if first < last else (0, 0)

    def block(self, start: int, end: int, first: int, last: int, device: torch.device) -> Tensor | None:
        """[1 or B, P, C] bool of queries [start, end) against keys [first, last); None when no rule is on."""
        seen: list[Tensor] = []
        queries = torch.arange(start + self.offset, end + self.offset, dtype=torch.int32, device=device)[None, :, None]
        ahead = torch.arange(first, last, dtype=torch.int32, device=device) - queries
        if self.causal:
            seen.append(ahead <= 0)
        if self.window is not None:
            seen.append(ahead > -self.window if self.causal else ahead.abs() < self.window)
        if self.query_segments_BT is not None and self.key_segments_BS is not None:
            documents = self.query_segments_BT[:, start:end, None]
            seen.append((documents == self.key_segments_BS[:, None, first:last]) & (documents != 0))
        return functools.reduce(torch.logical_and, seen) if seen else None

    def sees_something(self, num_queries: int, num_keys: int) -> bool:
        """Whether it is certain, without reading segments, that every query sees a key (itself)."""
        return self.query_segments_BT is None and self.offset >= 0 and self.offset + num_queries <= num_keys


@dataclass(frozen=True)
class Scoring:
    """How q and k become a score: ``cap(scale·Σ_c q_c·k_c·e^(−rate_c·|i − j|)) − slope·|i − j|``.

    Args:
        scale: factor on q·k.
        softcap: c in c·tanh(x/c); None = no cap.
        slopes_N: [N] constants per query head; None = no distance term.
        rates_H: [H] constants ≥ 0 by which channels of q·k fade with distance; None = all rates are 0.
    """

    scale: float
    softcap: float | None = None
    slopes_N: Tensor | None = None
    rates_H: Tensor | None = None


def distances(offset: int, start: int, end: int, first: int, last: int, device: torch.device) -> Tensor:
    """[P, C] fp32: |i − j| between queries [start, end) and keys [first, last)."""
    queries = torch.arange(start + offset, end + offset, dtype=torch.float32, device=device)[:, None]
    return (queries - torch.arange(first, last, dtype=torch.float32, device=device)).abs()
