"""What the tests of recurrent mixers share: a site, contexts, and decoding in pieces."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from graft.config.families import TokenMixerConfig
from graft.config.model import InitConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.part import Context, Part, Site

CPU = torch.device("cpu")


def build(config: TokenMixerConfig, hidden_size: int = 24, *, causal: bool = True) -> Part:
    """The part in fp64, with weights large enough to show."""
    site = Site(hidden_size, 0, 2, 4, causal, RMSNormConfig(), DenseConfig(), InitConfig(std=0.3))
    part = config.build(site).double()
    initialize(part, seed=1)
    return part


def context(x: Tensor, segments: Tensor | None = None, *, causal: bool = True) -> Context:
    """The surroundings of activations [B, T, D] (recurrent mixers do not read positions)."""
    nothing = torch.zeros(x.shape[:2], dtype=torch.int64)
    return Context(nothing, nothing, segments, causal)


def decoded(part: Part, x: Tensor, sizes: list[int], segments: Tensor | None = None) -> tuple[Tensor, Any]:
    """What the part gives in calls of ``sizes`` positions, and its last state."""
    state = part.init_state(x.shape[0], x.shape[1], device=CPU, dtype=x.dtype)
    pieces, edges = [], [0, *itertools.accumulate(sizes)]
    for start, end in itertools.pairwise(edges):
        now = None if segments is None else segments[:, start:end]
        out = part(x[:, start:end], context(x[:, start:end], now), state)
        state = out.state
        pieces.append(out.y)
    return torch.cat(pieces, dim=1), state


def states_around_padding(part: Part) -> tuple[Any, Any]:
    """The states after four positions of document 3, without and with two of padding behind them."""
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    _, before = decoded(part, x[:, :4], [4], torch.tensor([[3, 3, 3, 3]]))
    _, padded = decoded(part, x, [4, 2], torch.tensor([[3, 3, 3, 3, 0, 0]]))
    return before, padded


def splits(total: int) -> st.SearchStrategy[list[int]]:
    """Lists of positive sizes that add up to ``total``."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda c: [b - a for a, b in itertools.pairwise([0, *sorted(c), total])])


ROWS = [
    [4, 4, 4, 4, 7, 2, 2, 2, 2, 2, 2],
    [0, 0, 0, 5, 5, 5, 5, 1, 1, 0, 0],
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
]
"""Packed rows with padding at either end; document numbers in no order."""


def assert_documents_are_alone(part: Part, *, causal: bool = True) -> None:
    """Every document of `ROWS` gives what it gives by itself."""
    segments = torch.tensor(ROWS)
    x = torch.randn(*segments.shape, 24, dtype=torch.float64)
    packed = part(x, context(x, segments, causal=causal)).y
    for row, numbers in enumerate(ROWS):
        for number in set(numbers) - {0}:
            places = [t for t, other in enumerate(numbers) if other == number]
            alone = part(x[row : row + 1, places], context(x[:1, places], causal=causal)).y
            torch.testing.assert_close(packed[row : row + 1, places], alone, rtol=1e-9, atol=1e-11)


def assert_decoding_equals_forward(part: Part, sizes: list[int], *, packed: bool) -> None:
    """Calls of ``sizes`` positions (eleven in all) give what one gives over the whole."""
    segments = torch.tensor(ROWS) if packed else None
    x = torch.randn(len(ROWS), 11, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = part(x, context(x, segments)).y
        pieces, _ = decoded(part, x, sizes, segments)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if segments is None else segments != 0
    torch.testing.assert_close(pieces[real], whole[real], rtol=1e-9, atol=1e-11)
