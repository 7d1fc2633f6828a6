"""Recurrences that read every document in both directions, as an encoder does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graft.ops.documents import find_documents


def bidirectional_sum(
    one_way: Callable[..., Tensor], tensors: Sequence[Tensor], segment_ids_BT: Tensor | None = None
) -> Tensor:
    """A recurrence over the rows as they stand, plus the same over the rows turned round: [B, T, …].

    Going back, a position enters with its own factor as it does going forward, so that position n sees a later m faded
    by the factors of n … m − 1. What a position gives to itself is in both; the caller counts it once.

    Args:
        one_way: ``(*tensors, documents) -> [B, T, …]``, from the first position to the last; the documents are of type
            `graft.ops.documents.Documents`, or None.
        tensors: what it reads, [B, T, …]; T may be 1 where nothing varies.
        segment_ids_BT: document numbers, 0 = padding; None = one document per row and no padding.
    """
    turned = [x.flip(1) for x in tensors]
    if segment_ids_BT is None:
        return one_way(*tensors, None) + one_way(*turned, None).flip(1)
    ahead, back = find_documents(segment_ids_BT), find_documents(segment_ids_BT.flip(1))
    return one_way(*tensors, ahead) + one_way(*turned, back).flip(1)


def both_ways(x: Tensor, dim: int = 1) -> Tensor:
    """The rows of a batch, and behind them the same rows turned round along ``dim``: twice as many.

    What is done to each row is then done in both directions, in one go. Document numbers are turned like everything
    else, so that from the right a document begins with its last token.
    """
    return torch.cat((x, x.flip(dim)))


def mean_of_ways(y_BTA: Tensor) -> Tensor:
    """What the positions of rows `both_ways` got, [2 B, T, …], averaged over the two directions: [B, T, …]."""
    ahead, back = y_BTA.chunk(2)
    return (ahead + back.flip(1)) / 2


def own_values(q_BTKH: Tensor, k_BTKH: Tensor, v_BTNF: Tensor) -> Tensor:
    """``(q_t · k_t) v_t``, what a position of linear attention gives to itself: [B, T, N, F] in fp32 or wider.

    Args:
        q_BTKH: queries; each serves N / K heads of values in a row.
        k_BTKH: keys, alike.
        v_BTNF: values.
    """
    wide = torch.promote_types(v_BTNF.dtype, torch.float32)
    scores_BTK1 = (q_BTKH.to(wide) * k_BTKH.to(wide)).sum(-1, keepdim=True)
    return scores_BTK1.repeat_interleave(v_BTNF.shape[2] // q_BTKH.shape[2], dim=2) * v_BTNF
