"""Row numbers of hashed n-grams: the last few ids of each position, multiplied, combined by XOR, modulo a prime."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.kernels import Kernels
from graft.shapes import Int

LARGEST = 2**62
"""Products of ids and multipliers stay below this, so that no int64 overflows."""


def suffixes(
    ids_BT: Int[Tensor, "B T"],
    segment_ids_BT: Int[Tensor, "B T"] | None,
    length: int,
    *,
    kernels: Kernels = "auto",
) -> Int[Tensor, "B T N"]:
    """``ids[t − k] + 1`` for k = 0 … length − 1, and 0 where there is none in the document of position t.

    Args:
        ids_BT: ids, not negative.
        segment_ids_BT: document numbers, 0 = padding; None = one document and no padding.
        length: ids to look back at, the position's own included (N).
        kernels: ``reference`` looks each one up.
    """
    if kernels == "reference":
        return _suffixes_reference(ids_BT, segment_ids_BT, length)
    T = ids_BT.shape[1]
    numbers_BS = F.pad(ids_BT + 1, (length - 1, 0))
    found = [numbers_BS[:, length - 1 - k : length - 1 - k + T] for k in range(length)]
    if segment_ids_BT is not None:
        segments_BS = F.pad(segment_ids_BT, (length - 1, 0))
        for k in range(length):
            same_BT = segments_BS[:, length - 1 - k : length - 1 - k + T] == segment_ids_BT
            found[k] = found[k] * (same_BT & (segment_ids_BT != 0))
    return torch.stack(found, dim=-1)


def _suffixes_reference(ids_BT: Tensor, segment_ids_BT: Tensor | None, length: int) -> Tensor:
    """The definition, position by position."""
    suffixes_BTN = ids_BT.new_zeros((*ids_BT.shape, length))
    for b in range(ids_BT.shape[0]):
        for t in range(ids_BT.shape[1]):
            for k in range(min(length, t + 1)):
                own, other = (1, 1) if segment_ids_BT is None else (segment_ids_BT[b, t], segment_ids_BT[b, t - k])
                if own != 0 and own == other:
                    suffixes_BTN[b, t, k] = ids_BT[b, t - k] + 1
    return suffixes_BTN


def hashed_rows(
    suffixes_BTN: Int[Tensor, "B T N"], multipliers_RN: Int[Tensor, "R N"], sizes_R: Int[Tensor, " R"]
) -> Int[Tensor, "B T R"]:
    """``(⊕_k suffix[k] · multiplier[r, k]) mod size[r]`` for each of R hashes.

    A multiplier of 0 leaves its id out, so that hashes of shorter n-grams stand beside those of longer ones.

    Args:
        suffixes_BTN: from `suffixes`.
        multipliers_RN: not negative, each at most `LARGEST` over the largest number in ``suffixes_BTN``.
        sizes_R: rows of each table.
    """
    products_BTRN = suffixes_BTN.unsqueeze(-2) * multipliers_RN
    mixed_BTR = products_BTRN[..., 0]
    for k in range(1, products_BTRN.shape[-1]):
        mixed_BTR = mixed_BTR ^ products_BTRN[..., k]
    return mixed_BTR % sizes_R


def primes_from(start: int, count: int) -> list[int]:
    """The first ``count`` primes that are at least ``start``."""
    found: list[int] = []
    number = max(2, start)
    while len(found) < count:
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            found.append(number)
        number += 1
    return found
