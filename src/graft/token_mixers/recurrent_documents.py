"""The documents that a recurrent mixer meets in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.documents import Documents, find_documents


def documents_of(x_BTD: Tensor, segment_ids_BT: Tensor | None, segment_B: Tensor | None) -> Documents | None:
    """The documents of a call.

    Args:
        x_BTD: the positions of the call.
        segment_ids_BT: their document numbers; None = document 1.
        segment_B: the document under way before, 0 = none; None outside decoding.

    Returns:
        None for rows of one document each, without padding, before which there was nothing.
    """
    if segment_ids_BT is None:
        if segment_B is None:
            return None
        segment_ids_BT = segment_B.new_ones(x_BTD.shape[:2])
    return find_documents(segment_ids_BT, segment_B)


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
