"""Positions from documents, in one go and continued in chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graft.errors import ConfigError
from graft.network.sequence import ModelState, positions_in_segments


def plain(segments: list[int]) -> list[int]:
    """The definition: count on within a document, start again at another, 0 on padding."""
    positions: list[int] = []
    for i, segment in enumerate(segments):
        same = i > 0 and segments[i - 1] == segment
        positions.append(positions[-1] + 1 if same and segment else 0)
    return positions


def state(rows: int, max_len: int = 100) -> ModelState:
    return ModelState([], max_len, torch.zeros(rows, dtype=torch.int64))


def run(state: ModelState, segments: Tensor | None, sizes: list[int]) -> Tensor:
    """Positions of all chunks, with segment ids where there are any."""
    pieces = [None] * len(sizes) if segments is None else segments.split(sizes, dim=1)
    found: list[Tensor] = []
    for piece, size in zip(pieces, sizes, strict=True):
        ids = state.continue_segments(piece, size)
        positions = state.positions(ids, size)
        state.advance(positions, ids)
        found.append(positions.expand(len(state.next_position_B), -1))
    return torch.cat(found, 1)


@st.composite
def packed(draw: st.DrawFn) -> list[int]:
    """Left padding, documents numbered from 1, right padding."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    body = [i + 1 for i, length in enumerate(lengths) for _ in range(length)]
    return [0] * draw(st.integers(0, 3)) + body + [0] * draw(st.integers(0, 3))


@given(packed(), st.integers(1, 5))
def test_equal_the_definition_in_one_go_and_in_chunks(segments: list[int], chunk: int) -> None:
    expected = torch.tensor([plain(segments)])
    ids, nothing = torch.tensor([segments]), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(positions_in_segments(ids, nothing, nothing), expected)
    sizes = [min(chunk, len(segments) - i) for i in range(0, len(segments), chunk)]
    assert torch.equal(run(state(1), ids, sizes), expected)


def test_without_segments_all_rows_count_alike() -> None:
    assert torch.equal(run(state(2), None, [3, 1, 2]), torch.arange(6).expand(2, 6))


def test_documents_go_on_when_no_ids_are_given() -> None:
    standing = state(3)
    run(standing, torch.tensor([[0, 0, 1], [1, 1, 1], [1, 2, 2]]), [3])
    ids = standing.continue_segments(None, 2)
    assert ids is not None
    assert torch.equal(ids, torch.tensor([[1, 1], [1, 1], [2, 2]]))
    assert torch.equal(standing.positions(ids, 2), torch.tensor([[1, 2], [3, 4], [2, 3]]))


def test_ids_in_mid_sequence_continue_document_one() -> None:
    standing = state(2)
    run(standing, None, [3])
    assert torch.equal(standing.positions(torch.tensor([[1, 1], [2, 2]]), 2), torch.tensor([[3, 4], [0, 1]]))


def test_a_row_of_padding_alone_can_be_continued() -> None:
    standing = state(1)
    run(standing, torch.tensor([[0, 0]]), [2])
    ids = standing.continue_segments(None, 1)
    assert ids is not None
    assert ids.item() == 1
    assert standing.positions(ids, 1).item() == 0


def test_no_room_is_an_error() -> None:
    standing = state(1, max_len=4)
    run(standing, None, [3])
    with pytest.raises(ConfigError, match="2 tokens after 3 do not fit into a state for 4"):
        standing.continue_segments(None, 2)
