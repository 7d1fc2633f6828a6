"""Keys and values within segments of a document that count from its first token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graft.ops.documents import Documents


class SegmentKeys(NamedTuple):
    """Keys and values of the last C − 1 columns; of each column two: what it retrieved (0), and its own (1).

    Args:
        k_B2SNH: keys.
        v_B2SNH: values.
        numbers_BS: number of the column's segment within the row, where 0 is the one under way; -1 = not to be seen.
    """

    k_B2SNH: Tensor
    v_B2SNH: Tensor
    numbers_BS: Tensor


class Reach:
    """What the columns of a row may attend to, while the row is gone through from left to right: columns of their own
    segment no more than C − 1 away.

    Args:
        kept: of the columns before the row.
        documents: of the row.
        segment: tokens of a segment (C).
        causal: the columns after a column are hidden from it.
    """

    def __init__(self, kept: SegmentKeys, documents: Documents, segment: int, *, causal: bool = True):
        begins_BT = documents.real_BT & (documents.index_BT % segment == 0)
        self.numbers_BT = begins_BT.cumsum(1)
        seen_as_BT = torch.where(documents.real_BT, self.numbers_BT, -1)
        self.all_numbers = torch.cat((kept.numbers_BS, seen_as_BT), dim=1)
        self.size = segment - 1
        self.ahead = 0 if causal else self.size
        self.tail = self.latest = (kept.k_B2SNH, kept.v_B2SNH)
        self.first = self.last = 0

    def add(self, first: int, last: int, k_B2SNH: Tensor, v_B2SNH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns from ``first`` on, behind those kept; a second call for the same replaces
        them. What is given of columns from ``last`` on is for now alone, and is to be given again.
        """
        if first != self.first:
            self.tail, self.first = self._end(), first
        self.last = last
        now = (k_B2SNH, v_B2SNH)
        k, v = (torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip(self.tail, now, strict=True))
        self.latest = (k, v)
        return self.latest

    def seen(self, first: int, last: int, until: int) -> Tensor:
        """[B, c, C − 1 + s] bool: which of the columns kept and the s columns [first, until) each of the c columns
        [first, last) may attend to.
        """
        keys_BS = self.all_numbers[:, first : until + self.size]
        same = self.numbers_BT[:, first:last, None] == keys_BS[:, None]
        return same & torch.ones_like(same[0]).tril(self.size + self.ahead).triu()

    def kept(self, dtype: torch.dtype) -> SegmentKeys:
        """What the next call needs."""
        k, v = self._end()
        numbers_BS = self.all_numbers[:, self.all_numbers.shape[1] - self.size :]
        numbers_BS = torch.where(numbers_BS == self.numbers_BT[:, -1:], 0, -1)
        return SegmentKeys(k.to(dtype), v.to(dtype), numbers_BS)

    def _end(self) -> tuple[Tensor, Tensor]:
        k, v = self.latest
        end = slice(self.last - self.first, self.last - self.first + self.size)
        return k[:, :, end], v[:, :, end]
