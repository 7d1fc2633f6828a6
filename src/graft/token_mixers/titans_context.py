"""Titans with the memory as context of its attention."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from graft.ops.documents import Documents
from graft.ops.neural_memory import scan, width_of
from graft.ops.neural_memory_chunk import Bases, Memory, Writing, evaluate
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
        retrieving_BNTH: queries to the memory.
        positions_BT: positions.
    """

    q_BTNH: Tensor
    k_BTNH: Tensor
    v_BTNH: Tensor
    retrieving_BNTH: Tensor
    positions_BT: Tensor


class MemoryAsContext(Titans):
    """Titans, memory as context (MAC, section 4.1): attention over ``[persistent; retrieved; segment]``.

    Segments are the memory's chunks. Each token retrieves ``h = f(M_c; q(x))`` from the memory as its segment found it
    (equation 21), attends to the persistent tokens and, in its segment up to itself, to the retrieved vectors and the
    tokens (equations 22-23), writes the outcome y to the memory, and reads with it: ``o_proj(norm(y) ⊙ σ(norm(m)))``
    (equations 24-25). A retrieved vector has the position of its token.

    Deviations: those of `Titans`; y and h pass a projection to the width of the stream. Padding between tokens of one
    document counts towards the reach while decoding or packed: a key more than C − 1 columns back is not seen.
    """

    def __init__(self, config: TitansConfig, site: Site):
        super().__init__(config, site)
        size = self.num_heads * self.head_dim
        self.retrieved_proj = site.make_linear(size, site.hidden_size, role="titans")
        self.y_proj = site.make_linear(size, site.hidden_size, role="titans")
        self.attention_norm = site.make_norm(size)

    def mix(self, x_BTD: Tensor, ctx: Context, documents: Documents | None, state: TitansState | None) -> Mixed:
        segments = Segments(*self.heads(x_BTD, ctx), self.memory.query(x_BTD), ctx.positions_BT)
        reach = self._reach(segments.q_BTNH, documents, state)
        before = self.memory.empty(x_BTD.shape[0]) if state is None else state.memory
        y_BTA, read_BTA, memory = outside_graphs(self._go_through)(segments, before, documents, reach)
        joined_BTA = self.attention_norm(y_BTA) * self.memory_norm(read_BTA).sigmoid()
        near = None if reach is None or state is None else reach.kept(state.near.k_B2SNH.dtype)
        return Mixed(self.o_proj(joined_BTA), memory, near, None)

    def _go_through(
        self, segments: Segments, memory: Memory, documents: Documents | None, reach: Reach | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Segment by segment: what attention says and what the memory does, each [B, T, N·H], and the memory after."""
        said: dict[int, Tensor] = {}
        dtype = segments.q_BTNH.dtype

        width = width_of(self.chunk_size, self.kernels)
        retrieving = segments.retrieving_BNTH.split(width, dim=2)
        q, k, v = (x.split(width, dim=1) for x in (segments.q_BTNH, segments.k_BTNH, segments.v_BTNH))

        def propose(bases: Bases, first: int, last: int) -> Writing:
            now = first // width
            h_BCA = evaluate(bases, retrieving[now]).transpose(1, 2).flatten(-2)
            k_h, v_h = self._retrieved(h_BCA.to(dtype), segments.positions_BT[:, first:last])
            keys, values = torch.stack((k_h, k[now]), dim=1), torch.stack((v_h, v[now]), dim=1)
            said[first] = self._attend(q[now], keys, values, reach, first)
            return self.memory.writing(self.y_proj(said[first]))[0]

        length, start = segments.q_BTNH.shape[1], self.memory.start()
        read_BNTH, memory = scan(
            propose, memory, start, documents, length=length, chunk_size=self.chunk_size, kernels=self.kernels
        )
        return torch.cat(list(said.values()), dim=1), read_BNTH.transpose(1, 2).flatten(-2).to(dtype), memory

    def _reach(self, q_BTNH: Tensor, documents: Documents | None, state: TitansState | None) -> Reach | None:
        """The attention's past; None when every C columns are a segment of their own."""
        if documents is None:
            return None
        if state is not None:
            return Reach(state.near, documents, self.chunk_size)
        kept = self.empty_near(q_BTNH.shape[0], 0, device=q_BTNH.device, dtype=q_BTNH.dtype)
        return Reach(kept, documents, self.chunk_size)

    def _retrieved(self, h_BCA: Tensor, positions_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what was retrieved."""
        projected = self.retrieved_proj(h_BCA)
        k, v = (p(projected).unflatten(-1, (self.num_heads, self.head_dim)) for p in (self.k_proj, self.v_proj))
        k = k if self.k_norm is None else self.k_norm(k)
        return self.position.encode(k, tables_for(self.position, {}, positions_BC)), v

    def _attend(self, q_BCNH: Tensor, k_B2CNH: Tensor, v_B2CNH: Tensor, reach: Reach | None, first: int) -> Tensor:
        """The attention's answers [B, C, N·H] of the columns from ``first`` on."""
        C = q_BCNH.shape[1]
        if reach is None:
            seen = torch.ones((1, C, C), dtype=torch.bool, device=q_BCNH.device).tril()
        else:
            k_B2CNH, v_B2CNH = reach.add(first, k_B2CNH, v_B2CNH)
            seen = reach.seen(first, first + C)
        S = k_B2CNH.shape[2]
        y_BCNH = prefix_attention(
            q_BCNH,
            k_B2CNH.flatten(1, 2),
            v_B2CNH.flatten(1, 2),
            self.prefix(q_BCNH),
            scale=self.scale,
            seen_BTS=seen.repeat(1, 1, 2),
            nearness=self.nearness(q_BCNH.device)._replace(first_query=S - C, copies=2),
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
        query and a key it sees. All exact.
        """
        C, A = self.chunk_size, self.num_heads * self.head_dim
        lengths = [min(C, seq_len - first) for first in range(0, seq_len, C)]
        pairs = sum(c * (c + 1) for c in lengths) / seq_len + self.num_persistent
        sizes = pairwise(self.memory.sizes)
        retrieval = 2 * self.num_heads * sum(i * o for i, o in sizes)
        again = linear_flops(self.memory.q_proj) + linear_flops(self.k_proj) + linear_flops(self.v_proj)
        outside = linear_flops(self) - linear_flops(self.memory) + again
        return outside + retrieval + self.memory.flops(seq_len) / seq_len + 4 * A * pairs
