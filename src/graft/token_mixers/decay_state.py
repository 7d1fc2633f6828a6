"""What a recurrence with decay carries from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graft.ops.documents import nothing_yet


class DecayState(NamedTuple):
    """The state of `graft.ops.decay_attention`, and the document it belongs to.

    Args:
        S_BNHF: one matrix per head, in fp32 or wider: rounding it would add up over the positions.
        segment_B: number of the document under way; 0 = none yet.
        count_B: its real positions so far.
    """

    S_BNHF: Tensor
    segment_B: Tensor
    count_B: Tensor


def empty_decay_state(
    batch_size: int, num_heads: int, head_dim: int, value_dim: int, *, device: torch.device, dtype: torch.dtype
) -> DecayState:
    """The state before the first position."""
    wide = torch.promote_types(dtype, torch.float32)
    S_BNHF = torch.zeros(batch_size, num_heads, head_dim, value_dim, device=device, dtype=wide)
    nothing_B = nothing_yet(batch_size, device)
    return DecayState(S_BNHF, nothing_B, nothing_B.clone())
