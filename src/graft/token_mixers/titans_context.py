"""Titans with the memory as context of its attention."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from graft.ops.documents import Documents
from graft.ops.neural_memory import scan, width_of
from graft.ops.neural_memory_chunk import Base, Bases, Memory, Writing, evaluate
from graft.ops.outside_graphs import outside_graphs
from graft.ops.prefix_attention import prefix_attention
from graft.ops.segment_keys import Reach, SegmentKeys
from graft.part import Context, Site, State, linear_flops
from graft.positions.base import tables_for
from graft.token_mixers.titans_base import Mixed, Titans, TitansState
from graft.token_mixers.titans_config import TitansConfig


class Segments(NamedTuple):
    """What the layer makes of its positions before it goes through their segments.

    Args:
        q_BTNH: the attention's queries.
        k_BTNH: the attention's keys of the tokens themselves.
        v_BTNH: the attention's values of the tokens themselves.
        retrieving_BTNH: queries to the memory.
        positions_BT: positions.
    """

    q_BTNH: Tensor
    k_BTNH: Tensor
    v_BTNH: Tensor
    retrieving_BTNH: Tensor
    positions_BT: Tensor

    def pieces(self, width: int) -> list[Segments]:
        """Taken apart into ``width`` columns each."""
        return [Segments(*columns) for columns in zip(*(x.split(width, dim=1) for x in self), strict=True)]


class MemoryAsContext(Titans):
    """Titans, memory as context (MAC, section 4.1): attention over ``[persistent; retrieved; segment]``.

    Segments are the memory's chunks. Each token retrieves ``h = f(M_c; q(x))`` from the memory as its segment found it
    (equation 21), attends to the persistent tokens and, in its segment up to itself, to the retrieved vectors and the
    tokens (equations 22-23), writes the outcome y to the memory, and reads with it: ``o_proj(norm(y) ⊙ σ(norm(m)))``
    (equations 24-25). A retrieved vector has the position of its token.

    In an encoder a token attends to all of its segment. What is written depends on what the attention says, so the
    segments are gone through as a whole in either direction, each with segments, retrieved vectors and attention of its
    own; y and m are averaged over the two before they are joined.

    Deviations: those of `Titans`; y and h pass a projection to the width of the stream. Padding between tokens of one
    document counts towards the reach while decoding or packed: a key more than C − 1 columns away is not seen.
    """

    def __init__(self, config: TitansConfig, site: Site):
        super().__init__(config, site)
        size = self.num_heads * self.head_dim
        self.retrieved_proj = site.make_linear(size, site.hidden_size, role="titans")
        self.y_proj = site.make_linear(size, site.hidden_size, role="titans")
        self.attention_norm = site.make_norm(size)

    def mix(self, x_BTD: Tensor, ctx: Context, documents: Documents | None, state: TitansState | None) -> Mixed:
        retrieving_BTNH = self.memory.query(x_BTD).transpose(1, 2)
        segments = Segments(*self.heads(x_BTD, ctx), retrieving_BTNH, ctx.positions_BT)
        segments = Segments(*(self.turned(x) for x in segments))
        reach = self._reach(segments.q_BTNH, documents, state)
        before = self.memory.empty(len(segments.q_BTNH)) if state is None else state.memory
        y_BTA, read_BTA, memory = outside_graphs(self._go_through)(segments, before, documents, reach)
        y_BTA, read_BTA = self.heard(y_BTA), self.heard(read_BTA).to(x_BTD.dtype)
        joined_BTA = self.attention_norm(y_BTA) * self.memory_norm(read_BTA).sigmoid()
        near = None if reach is None or state is None else reach.kept(state.near.k_B2SNH.dtype)
        return Mixed(self.o_proj(joined_BTA), memory, near, None)

    def _go_through(
        self, segments: Segments, memory: Memory, documents: Documents | None, reach: Reach | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Segment by segment: what attention says and what the memory does, each [B, T, N·H], and the memory after."""
        said: dict[int, Tensor] = {}
        width = width_of(self.chunk_size, self.kernels)
        pieces = segments.pieces(width)
        ahead = 0 if reach is None else -(-reach.ahead // width)

        def propose(bases: Bases, first: int, last: int) -> Writing:
            here = first // width
            near = zip(*pieces[here : here + 1 + ahead], strict=True)
            within = Segments(*(torch.cat(columns, dim=1) for columns in near))
            said[first] = self._attend(within, bases, reach, first, last)
            return self.memory.writing(self.y_proj(said[first]))[0]

        length, start = segments.q_BTNH.shape[1], self.memory.start()
        read_BNTH, memory = scan(
            propose, memory, start, documents, length=length, chunk_size=self.chunk_size,
            max_surprise=self.memory.max_surprise, kernels=self.kernels,
        )  # fmt: skip
        return torch.cat(list(said.values()), dim=1), read_BNTH.transpose(1, 2).flatten(-2), memory

    def _reach(self, q_BTNH: Tensor, documents: Documents | None, state: TitansState | None) -> Reach | None:
        """What a column may attend to; None when every C columns are a segment of their own."""
        if documents is None:
            return None
        if state is not None:
            return Reach(state.near, documents, self.chunk_size)
        kept = self.empty_near(q_BTNH.shape[0], 0, device=q_BTNH.device, dtype=q_BTNH.dtype)
        return Reach(kept, documents, self.chunk_size, causal=self.causal)

    def _retrieved(self, h_BCA: Tensor, positions_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what was retrieved."""
        projected = self.retrieved_proj(h_BCA)
        k, v = (p(projected).unflatten(-1, (self.num_heads, self.head_dim)) for p in (self.k_proj, self.v_proj))
        k = k if self.k_norm is None else self.k_norm(k)
        return self.position.encode(k, tables_for(self.position, {}, positions_BC)), v

    def _attend(self, within: Segments, bases: Bases, reach: Reach | None, first: int, last: int) -> Tensor:
        """The attention's answers [B, C, N·H] of columns [first, last).

        Args:
            within: these columns, and in an encoder those after them to which the last one's segment may go on.
            bases: the weights with which the columns' segments began.
            reach: what they may attend to; None = each other.
            first: index of the first column.
            last: index after the last.
        """
        C, S = last - first, within.q_BTNH.shape[1]
        q_BCNH = within.q_BTNH[:, :C]
        h_BNSH = evaluate(_going_on(bases, S - C), within.retrieving_BTNH.transpose(1, 2))
        h_BSA = h_BNSH.transpose(1, 2).flatten(-2).to(q_BCNH.dtype)
        k_h, v_h = self._retrieved(h_BSA, within.positions_BT)
        k_B2SNH, v_B2SNH = torch.stack((k_h, within.k_BTNH), dim=1), torch.stack((v_h, within.v_BTNH), dim=1)
        if reach is None:
            seen = torch.ones((1, C, C), dtype=torch.bool, device=q_BCNH.device)
            seen = seen.tril() if self.causal else seen
        else:
            k_B2SNH, v_B2SNH = reach.add(first, last, k_B2SNH, v_B2SNH)
            seen = reach.seen(first, last, first + S)
        first_query = 0 if reach is None else reach.size
        y_BCNH = prefix_attention(
            q_BCNH,
            k_B2SNH.flatten(1, 2),
            v_B2SNH.flatten(1, 2),
            self.prefix(q_BCNH),
            scale=self.scale,
            seen_BTS=seen.repeat(1, 1, 2),
            nearness=self.nearness(q_BCNH.device)._replace(first_query=first_query, copies=2, causal=self.causal),
            kernels=self.kernels,
        )
        return y_BCNH.flatten(-2)

    def empty_near(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Room for C − 1 columns."""
        shape = (batch_size, 2, self.chunk_size - 1, self.num_heads, self.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        numbers_BS = torch.full((batch_size, shape[2]), -1, dtype=torch.int64, device=device)
        return SegmentKeys(k, v, numbers_BS)

    def flops_per_token(self, seq_len: int) -> float:
        """Projections, those used twice counted twice; retrieval and memory in their chunked form; 4·N·H per pair of a
        query and a key it sees; in an encoder all that is done to segments twice. All exact.
        """
        C, A = self.chunk_size, self.num_heads * self.head_dim
        lengths = [min(C, seq_len - first) for first in range(0, seq_len, C)]
        pairs = sum(c * (c + 1) if self.causal else 2 * c * c for c in lengths) / seq_len + self.num_persistent
        sizes = pairwise(self.memory.sizes)
        retrieval = 2 * self.num_heads * sum(i * o for i, o in sizes)
        tokens = (self.q_proj, self.k_proj, self.v_proj, self.memory.q_proj, self.o_proj)
        each_way = (self.retrieved_proj, self.k_proj, self.v_proj, self.y_proj, self.memory)
        once, again = (sum(linear_flops(m) for m in modules) for modules in (tokens, each_way))
        way = again + retrieval + self.memory.scan_flops(seq_len) / seq_len + 4 * A * pairs
        return once + self.num_ways * way


def _going_on(bases: Bases, extra: int) -> Bases:
    """The same for ``extra`` columns more, which have the weights of the last."""
    return tuple(Base(weights, None if mask_BC is None else _repeated(mask_BC, extra)) for weights, mask_BC in bases)


def _repeated(mask_BC: Tensor, extra: int) -> Tensor:
    return torch.cat((mask_BC, mask_BC[:, -1:].expand(-1, extra)), dim=1)
