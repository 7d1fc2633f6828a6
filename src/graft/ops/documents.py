"""Where documents begin in a row, for recurrences that must forget at their borders and skip padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """The documents of T positions, as a recurrence reads them. Padding belongs to the document before it.

    Args:
        real_BT: False on padding.
        run_BT: how many documents have begun up to each position; 0 = the one that was under way before the first.
        index_BT: real positions of the same document before each one.
        segment_B: number of the document under way after the last position.
        count_B: its real positions so far.
    """

    real_BT: Tensor
    run_BT: Tensor
    index_BT: Tensor
    segment_B: Tensor
    count_B: Tensor


def find_documents(segment_ids_BT: Tensor, segment_B: Tensor | None = None, count_B: Tensor | None = None) -> Documents:
    """The documents of a row.

    Args:
        segment_ids_BT: document numbers, 0 = padding; a document's positions have nothing but padding between them.
        segment_B: the document under way before the first position; None = none.
        count_B: its real positions so far; None = 0.
    """
    T = segment_ids_BT.shape[1]
    if segment_B is None:
        segment_B = segment_ids_BT.new_zeros(segment_ids_BT.shape[0])
    if count_B is None:
        count_B = torch.zeros_like(segment_B)
    real_BT = segment_ids_BT != 0
    places_T = torch.arange(1, T + 1, device=segment_ids_BT.device)
    last_BT = torch.where(real_BT, places_T, 0).cummax(dim=1).values  # place of the last real position, 0 = before
    known_BS = torch.cat((segment_B[:, None].to(segment_ids_BT.dtype), segment_ids_BT), dim=1)
    current_BT = known_BS.gather(1, last_BT)
    before_BT = torch.cat((known_BS[:, :1], current_BT[:, :-1]), dim=1)
    begins_BT = current_BT != before_BT
    seen_BT = real_BT.cumsum(1)
    skipped_BT = torch.where(begins_BT, seen_BT - 1, -count_B[:, None]).cummax(dim=1).values  # of other documents
    index_BT = (seen_BT - 1 - skipped_BT).clamp_min(0)
    return Documents(
        real_BT,
        begins_BT.cumsum(1),
        index_BT,
        current_BT[:, -1].to(segment_B.dtype),
        seen_BT[:, -1] - skipped_BT[:, -1],
    )


def continued_segments(segment_ids_BT: Tensor | None, segment_B: Tensor, num_new: int) -> Tensor:
    """Document numbers of the next positions: the given ones, else each row's document goes on (the first is 1)."""
    if segment_ids_BT is not None:
        return segment_ids_BT
    return segment_B.clamp_min(1)[:, None].expand(-1, num_new)


def documents_of(
    segment_ids_BT: Tensor | None, num_positions: int, segment_B: Tensor | None, count_B: Tensor | None = None
) -> Documents | None:
    """The documents that a recurrence meets in one call.

    Args:
        segment_ids_BT: as of `continued_segments`.
        num_positions: positions of the call.
        segment_B: the document under way before, 0 = none; None outside decoding.
        count_B: its real positions so far; None = they are not needed.

    Returns:
        None for rows of one document each, without padding, before which there was nothing.
    """
    if segment_B is not None:
        segment_ids_BT = continued_segments(segment_ids_BT, segment_B, num_positions)
    return None if segment_ids_BT is None else find_documents(segment_ids_BT, segment_B, count_B)


def begins(documents: Documents) -> Tensor:
    """[B, T] bool: the positions with which a document begins."""
    return documents.run_BT != F.pad(documents.run_BT[:, :-1], (1, 0))


def forgetting(log_decay: Tensor, documents: Documents | None) -> Tensor:
    """Logarithms of decays [B, T, …], such that a document begins with an empty memory and padding decays nothing."""
    if documents is None:
        return log_decay
    shape = (*documents.real_BT.shape, *(1,) * (log_decay.dim() - 2))
    forgets, real = begins(documents).view(shape), documents.real_BT.view(shape)
    return log_decay.masked_fill(~real, 0.0).masked_fill(forgets, -torch.inf)


def nothing_yet(batch_size: int, device: torch.device) -> Tensor:
    """[B] int64: the document under way before the first position."""
    return torch.zeros(batch_size, dtype=torch.int64, device=device)


def padded_documents(documents: Documents, extra: int) -> Documents:
    """The same with ``extra`` positions of padding after the last."""
    return documents._replace(
        real_BT=F.pad(documents.real_BT, (0, extra), value=False),
        run_BT=torch.cat((documents.run_BT, documents.run_BT[:, -1:].expand(-1, extra)), dim=1),
    )
