"""Positions of tokens, from the documents they belong to and from what came before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.errors import ConfigError
from graft.ops.short_conv import ConvState
from graft.part import State
from graft.shapes import Int


def check_ids(input_ids: Tensor) -> None:
    """Raises ConfigError unless it is a batch of token ids."""
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"a tensor of shape {tuple(input_ids.shape)} and {str(input_ids.dtype).removeprefix('torch.')}",
            where="input_ids",
            expected="token ids [batch, time], int64 or int32",
            fix="add the batch with ids[None]" if input_ids.dim() == 1 else None,
        )


def positions_in_segments(
    segment_ids_BT: Int[Tensor, "B T"], previous_segment_B: Int[Tensor, " B"], next_position_B: Int[Tensor, " B"]
) -> Int[Tensor, "B T"]:
    """Positions that start at 0 in every document; padding (segment 0) gets 0.

    Args:
        segment_ids_BT: document numbers.
        previous_segment_B: the document of the token before the first column; 0 = none.
        next_position_B: the position of the first column if its document goes on.
    """
    index_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    before_BT = torch.cat([previous_segment_B[:, None], segment_ids_BT[:, :-1]], dim=1)
    # a document that goes on started next_position columns before the first one
    carried_BT = -next_position_B[:, None].expand_as(segment_ids_BT)
    start_BT = torch.where(segment_ids_BT != before_BT, index_T, carried_BT).cummax(dim=1).values
    return (index_T - start_BT).masked_fill(segment_ids_BT == 0, 0)


@dataclass
class ModelState:
    """Where a batch of sequences stands. Made by `Model.init_state`, updated in place by `Model.decode`.

    Args:
        branches: what each part carries: ``branches[loop][layer][branch name]``.
        max_len: positions there is room for, padding included.
        length: positions seen so far, padding included.
        next_position_B: position of each row's next token, if its document goes on.
        embedding: what the embedding's convolution carries; None without one.
        segment_B: document of each row's last token; None while no call has given segment ids: all is document 1.
    """

    branches: list[list[dict[str, State]]]
    max_len: int
    next_position_B: Tensor
    embedding: ConvState | None = None
    length: int = 0
    segment_B: Tensor | None = None

    def continue_segments(self, segment_ids_BS: Tensor | None, num_new: int) -> Tensor | None:
        """Segment ids of the next tokens: the given ones, else each row's document goes on.

        Raises:
            ConfigError: there is no room for the tokens.
        """
        if self.length + num_new > self.max_len:
            raise ConfigError(
                f"{num_new} tokens after {self.length} do not fit into a state for {self.max_len}",
                where="decode",
                fix="make the state with a larger max_len",
            )
        if segment_ids_BS is None and self.segment_B is not None:
            return self.segment_B.clamp(min=1)[:, None].expand(-1, num_new)
        return segment_ids_BS

    def positions(self, segment_ids_BS: Tensor | None, num_new: int) -> Tensor:
        """[B or 1, S] positions of the next tokens, counted on from this state."""
        if segment_ids_BS is None:  # every row has seen the same number of tokens
            return self.length + torch.arange(num_new, device=self.next_position_B.device)[None]
        previous_B = self.segment_B
        if previous_B is None:  # what came without segment ids is document 1
            previous_B = torch.full_like(self.next_position_B, int(self.length > 0))
        return positions_in_segments(segment_ids_BS, previous_B, self.next_position_B)

    def advance(self, positions_BS: Tensor, segment_ids_BS: Tensor | None) -> None:
        """Counts the tokens that were just seen."""
        self.length += positions_BS.shape[1]
        self.next_position_B = (positions_BS[:, -1] + 1).expand_as(self.next_position_B)
        self.segment_B = None if segment_ids_BS is None else segment_ids_BS[:, -1]


def positions_of(ids_BT: Tensor, segment_ids_BT: Tensor | None, state: ModelState | None) -> Tensor:
    """[B or 1, T] positions of tokens, from their documents (None = one per row), going on from ``state``."""
    if state is not None:
        return state.positions(segment_ids_BT, ids_BT.shape[1])
    if segment_ids_BT is None:
        return torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    nothing_B = segment_ids_BT.new_zeros(segment_ids_BT.shape[0])
    return positions_in_segments(segment_ids_BT, nothing_B, nothing_B)
