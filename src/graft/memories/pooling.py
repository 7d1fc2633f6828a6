"""Whose scores choose a position's chapters: means over spans of its document, exact across decoding calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from graft.memories.memory_bank_config import MemoryBankConfig
from graft.ops.documents import Documents, begins, continued_segments, find_documents, nothing_yet
from graft.ops.kernels import Kernels
from graft.ops.span_sums import span_sums
from graft.shapes import Float


class PoolState(NamedTuple):
    """What pooling carries: a few columns that stand for all before, each the sum of some positions.

    Args:
        sums_BJE: sums of scores, fp32 or wider; zero where nothing of the document under way is in them.
        counts_BJ: how many positions each is the sum of, in the same dtype.
        segment_B: number of the document under way; 0 = none yet.
        length_B: its positions so far.
    """

    sums_BJE: Tensor
    counts_BJ: Tensor
    segment_B: Tensor
    length_B: Tensor


class Spans(NamedTuple):
    """Which columns are averaged; columns count from the first carried one, the end of a span is not in it.

    Args:
        counted_BT: positions that enter any mean.
        first_BT: where each position's span begins.
        last_BT: where it ends; the same column = nothing to average.
        kept_first_BJ: where the spans begin whose sums are carried on.
        kept_last_BJ: where they end.
    """

    counted_BT: Tensor
    first_BT: Tensor
    last_BT: Tensor
    kept_first_BJ: Tensor
    kept_last_BJ: Tensor


class Columns(NamedTuple):
    """A row's positions as columns behind the carried ones.

    Args:
        here_BT: the column of each position.
        start_BT: the first column of its document; 0 = the carried ones belong to it.
        end: the column behind the last position.
    """

    here_BT: Tensor
    start_BT: Tensor
    end: int

    @classmethod
    def of(cls, documents: Documents, carried: int) -> Columns:
        """Columns of the T positions, ``carried`` before them."""
        B, T = documents.run_BT.shape
        here_BT = torch.arange(carried, carried + T, device=documents.run_BT.device).expand(B, -1)
        start_BT = torch.where(begins(documents), here_BT, 0).cummax(dim=1).values
        return cls(here_BT, start_BT, carried + T)


class Pooling(ABC):
    """Over which positions scores are averaged.

    Attributes:
        carried: columns of the state.
        may_be_empty: some positions have nothing to average.
    """

    carried: int
    may_be_empty: bool = False

    @abstractmethod
    def spans(self, documents: Documents, columns: Columns) -> Spans:
        """The spans of a row; those of padding mean nothing."""

    def __call__(
        self,
        scores_BTE: Float[Tensor, "B T E"],
        segment_ids_BT: Tensor | None,
        state: PoolState | None,
        *,
        kernels: Kernels = "auto",
    ) -> tuple[Tensor, Tensor, PoolState | None]:
        """Means [B, T, E], how many positions each is of [B, T] (0: the mean is 0), and the state after the row."""
        B, T, E = scores_BTE.shape
        going_on = state is not None
        if state is None:
            state = self.empty_state(B, E, device=scores_BTE.device, dtype=scores_BTE.dtype)
        segment_ids_BT = continued_segments(segment_ids_BT, state.segment_B, T)
        documents = find_documents(segment_ids_BT, state.segment_B, state.length_B)
        spans = self.spans(documents, Columns.of(documents, self.carried))
        counts_BT1 = spans.counted_BT[..., None].to(scores_BTE.dtype)
        carried_BJE = torch.cat((state.sums_BJE, state.counts_BJ[..., None]), dim=2).to(scores_BTE.dtype)
        new_BTE = torch.cat((scores_BTE * counts_BT1, counts_BT1), dim=2)
        columns_BSE = torch.cat((carried_BJE, new_BTE), dim=1)
        sums_BTE = span_sums(columns_BSE, spans.first_BT, spans.last_BT, kernels=kernels)
        counts_BT = sums_BTE[..., -1]
        means_BTE = sums_BTE[..., :-1] / counts_BT[..., None].clamp_min(1)
        if not going_on:
            return means_BTE, counts_BT, None
        kept_BJE = span_sums(columns_BSE, spans.kept_first_BJ, spans.kept_last_BJ, kernels=kernels)
        kept_BJE = kept_BJE.to(state.sums_BJE.dtype)
        after = PoolState(kept_BJE[..., :-1], kept_BJE[..., -1], documents.segment_B, documents.count_B)
        return means_BTE, counts_BT, after

    def empty_state(self, batch_size: int, num_scores: int, *, device: torch.device, dtype: torch.dtype) -> PoolState:
        """The state before the first position."""
        wide = torch.promote_types(dtype, torch.float32)
        nothing_B = nothing_yet(batch_size, device)
        sums_BJE = torch.zeros(batch_size, self.carried, num_scores, dtype=wide, device=device)
        return PoolState(sums_BJE, torch.zeros_like(sums_BJE[..., 0]), nothing_B, nothing_B.clone())


class Rolling(Pooling):
    """The last ``window`` positions of the document, the position itself included (padding inside one counts too)."""

    def __init__(self, window: int):
        self.carried = window - 1

    def spans(self, documents: Documents, columns: Columns) -> Spans:
        last_BT = columns.here_BT + 1
        first_BT = torch.maximum(columns.start_BT, last_BT - (self.carried + 1))
        kept_J = torch.arange(columns.end - self.carried, columns.end, device=last_BT.device)
        kept_BJ = kept_J.expand(last_BT.shape[0], -1)
        inside_BJ = kept_BJ >= columns.start_BT[:, -1:]
        return Spans(documents.real_BT, first_BT, last_BT, kept_BJ, kept_BJ + inside_BJ.to(kept_BJ.dtype))


class Chunk(Pooling):
    """The chunk of ``size`` positions before the position's own, counted from the start of the document."""

    carried = 2  # the chunk before the one under way, and what there is of that
    may_be_empty = True

    def __init__(self, size: int):
        self.size = size

    def spans(self, documents: Documents, columns: Columns) -> Spans:
        opens_BT = documents.real_BT & (documents.index_BT % self.size == 0)
        own_BT = torch.where(opens_BT, columns.here_BT, 1).cummax(dim=1).values
        carried_B2 = torch.arange(2, device=own_BT.device).expand(own_BT.shape[0], 2)
        before_BT = torch.cat((carried_B2, own_BT), dim=1).gather(1, own_BT - 1)
        has_one_BT = documents.index_BT >= self.size
        first_BT = torch.where(has_one_BT, before_BT, own_BT)
        end_B1 = torch.full_like(own_BT[:, -1:], columns.end)
        kept_first_B2 = torch.cat((first_BT[:, -1:], own_BT[:, -1:]), dim=1)
        kept_last_B2 = torch.cat((own_BT[:, -1:], end_B1), dim=1)
        return Spans(documents.real_BT, first_BT, own_BT, kept_first_B2, kept_last_B2)


class Prefix(Pooling):
    """The first ``length`` positions of the document, for all behind them."""

    carried = 1
    may_be_empty = True

    def __init__(self, length: int):
        self.length = length

    def spans(self, documents: Documents, columns: Columns) -> Spans:
        counted_BT = documents.real_BT & (documents.index_BT < self.length)
        last_BT = columns.here_BT + 1
        first_BT = torch.where(documents.index_BT >= self.length, columns.start_BT, last_BT)
        end_B1 = torch.full_like(last_BT[:, -1:], columns.end)
        return Spans(counted_BT, first_BT, last_BT, columns.start_BT[:, -1:], end_B1)


class Sequence(Pooling):
    """The whole document; in decoding, all of it up to the end of the call."""

    carried = 1

    def spans(self, documents: Documents, columns: Columns) -> Spans:
        start_BT, end = columns.start_BT, columns.end
        opens_BT = torch.where(begins(documents), columns.here_BT, end)
        next_BT = opens_BT.flip(1).cummin(dim=1).values.flip(1)  # the first opening at or behind each position
        end_B1 = torch.full_like(next_BT[:, -1:], end)
        last_BT = torch.cat((next_BT[:, 1:], end_B1), dim=1)
        return Spans(documents.real_BT, start_BT, last_BT, start_BT[:, -1:], end_B1)


POOLINGS: dict[str, Callable[[MemoryBankConfig], Pooling | None]] = {
    "token": lambda _: None,
    "rolling": lambda config: Rolling(config.routing_window),
    "chunk": lambda config: Chunk(config.routing_chunk_size),
    "prefix": lambda config: Prefix(config.routing_prefix_len),
    "sequence": lambda _: Sequence(),
}
"""Routing -> what its means are over; None = no means, each position for itself."""
