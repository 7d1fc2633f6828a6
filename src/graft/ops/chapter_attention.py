"""Attention of each position to the chapters chosen for it, every chapter with a softmax of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.kernels import Kernels
from graft.shapes import Float, Int

BLOCKS_PER_CHAPTER = 4
"""Blocks that an evenly used chapter is cut into: more waste less on half-empty blocks and copy more keys."""


def chapter_attention(
    q_TNH: Float[Tensor, "T N H"],
    k_EMKH: Float[Tensor, "E M K H"],
    v_EMKH: Float[Tensor, "E M K H"],
    chapters_TC: Int[Tensor, "T C"],
    weights_TC: Float[Tensor, "T C"],
    *,
    scale: float,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
) -> Float[Tensor, "T N H"]:
    """``y[t] = Σ_c weights[t, c] · softmax(scale · k[e] q[t]) v[e]`` with ``e = chapters[t, c]``.

    Args:
        q_TNH: queries of T positions, N = K·G heads; head n reads key head n // G.
        k_EMKH: keys of the M slots of E chapters.
        v_EMKH: values.
        chapters_TC: the C different chapters that each position reads.
        weights_TC: of each; fp32 or wider, the sum is made in this dtype.
        scale: factor on q·k.
        dropout: rate of probabilities dropped; 0 outside training.
        kernels: ``reference`` forces the plain definition.

    Returns:
        In the dtype of q (autocast's under autocast).
    """
    form = every_chapter if kernels == "reference" else grouped_by_chapter
    return form(q_TNH, k_EMKH, v_EMKH, chapters_TC, weights_TC, scale=scale, dropout=dropout)


def every_chapter(
    q_TNH: Tensor,
    k_EMKH: Tensor,
    v_EMKH: Tensor,
    chapters_TC: Tensor,
    weights_TC: Tensor,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """The definition: every position reads every chapter, with weight 0 those that were not chosen for it."""
    num_positions, num_chapters = q_TNH.shape[0], k_EMKH.shape[0]
    weights_TE = weights_TC.new_zeros(num_positions, num_chapters).scatter(1, chapters_TC, weights_TC)
    total_TNH: Tensor | None = None
    dtype = q_TNH.dtype
    for e in range(num_chapters):
        one_row = (q_TNH[None], k_EMKH[e][None], v_EMKH[e][None], Visibility(causal=False), Scoring(scale))
        read_TNH = attention(*one_row, dropout=dropout, kernels="reference")[0]
        dtype = read_TNH.dtype
        weighted_TNH = weights_TE[:, e, None, None] * read_TNH
        total_TNH = weighted_TNH if total_TNH is None else total_TNH + weighted_TNH
    assert total_TNH is not None, "a bank has at least one chapter"
    return total_TNH.to(dtype)


class Blocks(NamedTuple):
    """Pairs of a position and a chapter, in blocks of one chapter each.

    Args:
        place_X: the row, counted through all blocks, of every pair.
        chapter_J: the chapter of every block.
        rows: rows of a block; those without a pair are padding.
    """

    place_X: Tensor
    chapter_J: Tensor
    rows: int


def blocks_of(chapter_X: Int[Tensor, " X"], num_chapters: int) -> Blocks:
    """Sorts pairs by chapter and cuts each chapter's into blocks.

    How many blocks there are depends on shapes alone (as many as the worst distribution of pairs needs), so that
    nothing waits for the device and a compiled graph fits every choice.

    Args:
        chapter_X: the chapter of every pair.
        num_chapters: chapters (E).
    """
    pairs, device = chapter_X.shape[0], chapter_X.device
    rows = max(1, pairs // (BLOCKS_PER_CHAPTER * num_chapters))
    num_blocks = (pairs + min(num_chapters, pairs) * (rows - 1)) // rows  # Σ ceil(n / rows) of any n that add up to it
    order_X = chapter_X.argsort(stable=True)
    sorted_X = chapter_X[order_X]
    counts_E = chapter_X.new_zeros(num_chapters).scatter_add(0, chapter_X, torch.ones_like(chapter_X))
    blocks_E = (counts_E + rows - 1) // rows
    first_row_E = (blocks_E.cumsum(0) - blocks_E) * rows
    first_pair_E = counts_E.cumsum(0) - counts_E
    rank_X = torch.arange(pairs, device=device) - first_pair_E[sorted_X]
    place_X = torch.empty_like(chapter_X).scatter(0, order_X, first_row_E[sorted_X] + rank_X)
    numbers_J = torch.arange(num_blocks, device=device)
    chapter_J = torch.searchsorted(blocks_E.cumsum(0), numbers_J, right=True).clamp_max(num_chapters - 1)
    return Blocks(place_X, chapter_J, rows)


def grouped_by_chapter(
    q_TNH: Tensor,
    k_EMKH: Tensor,
    v_EMKH: Tensor,
    chapters_TC: Tensor,
    weights_TC: Tensor,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """The queries of each chapter side by side, so that no key is copied for a single query.

    Costs the chosen pairs of query and slot, and up to a share of 1 / `BLOCKS_PER_CHAPTER` more for padding.
    """
    blocks = blocks_of(chapters_TC.flatten(), k_EMKH.shape[0])
    num_blocks, choices = blocks.chapter_J.shape[0], chapters_TC.shape[1]
    q_XNH = q_TNH.repeat_interleave(choices, dim=0)
    empty = q_TNH.new_zeros(num_blocks * blocks.rows, *q_TNH.shape[1:])
    read = attention(
        empty.index_copy(0, blocks.place_X, q_XNH).unflatten(0, (num_blocks, blocks.rows)),
        k_EMKH.index_select(0, blocks.chapter_J),
        v_EMKH.index_select(0, blocks.chapter_J),
        Visibility(causal=False),
        Scoring(scale),
        dropout=dropout,
    )
    read_TCNH = read.flatten(0, 1).index_select(0, blocks.place_X).unflatten(0, chapters_TC.shape)
    return (weights_TC[..., None, None] * read_TCNH).sum(1).to(read.dtype)
