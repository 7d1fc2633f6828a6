"""One micro-batch: what the loader hands out and an objective reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED_TARGET = -100
"""A target with this value is not predicted: it adds nothing to the loss and is not counted."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with what is to be predicted at each position.

    Args:
        input_ids_BT: int64 token ids.
        targets_BT: int64 ids to predict at each position; `IGNORED_TARGET` = nothing.
        segment_ids_BT: document numbers within each row, from 1; 0 = padding. None = one document per row, no padding.
        positions_BT: int64 positions; None = counted from the segments, from 0 in every document.
        num_targets: targets that are not ignored: the loss is a sum over these, so this is its denominator.
        num_bytes: UTF-8 bytes those targets stand for, for bits per byte.
        sample_ids: global numbers of the rows in the order of the data, for logs and for finding a bad row again.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    segment_ids_BT: Tensor | None
    positions_BT: Tensor | None
    num_targets: int
    num_bytes: int
    sample_ids: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """Positions in the batch, padding included: the denominator of auxiliary sums."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on ``device``."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=non_blocking),
            targets_BT=self.targets_BT.to(device, non_blocking=non_blocking),
            segment_ids_BT=move(self.segment_ids_BT),
            positions_BT=move(self.positions_BT),
        )
