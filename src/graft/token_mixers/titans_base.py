"""What all forms of Titans share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.linears.joint import joint_linear
from graft.ops.bidirectional import both_ways, mean_of_ways
from graft.ops.documents import Documents, documents_of, nothing_yet
from graft.ops.neural_memory_chunk import Memory, Writing
from graft.ops.outside_graphs import outside_graphs
from graft.ops.prefix_attention import Nearness, Prefix
from graft.ops.short_conv import ConvState
from graft.part import Context, Part, PartOutput, Site, State
from graft.positions.base import AttentionPosition, tables_for
from graft.shapes import Float
from graft.token_mixers.titans_config import TitansConfig
from graft.token_mixers.titans_memory import NeuralMemory, PersistentTokens


class TitansState(NamedTuple):
    """What a Titans layer carries.

    Args:
        memory: weights, momentum, and the weights at the beginning of the chunk under way, in fp32 or wider.
        near: what the attention keeps (the form's own affair).
        conv: the last inputs of the memory's convolutions; None without.
        segment_B: the document under way; 0 = none.
        count_B: its positions so far.
    """

    memory: Memory
    near: Any
    conv: ConvState | None
    segment_B: Tensor
    count_B: Tensor


class Mixed(NamedTuple):
    """What a form makes of its positions: what to add to the stream, and the first three fields of its next state."""

    y_BTD: Tensor
    memory: Memory
    near: Any
    conv: ConvState | None


class Titans(Part):
    """Attention of short reach joined with a neural long-term memory (Titans: Learning to Memorize at Test Time,
    arXiv 2501.00663, section 4); a subclass is a form.

    The memory (`graft.ops.neural_memory`, `graft.token_mixers.titans_memory`) follows equations 8-14 with gradients
    taken where the chunk begins (section 3.2). Token t reads M_t: updated by all tokens of its document up to itself,
    each with the gradient at the weights with which *its* chunk began. Chunks count from the document's first token, so
    a document computes the same alone, packed and in any pieces.

    Deviations, all forms: a memory per head, of head_dim channels; bounded gates (sigmoids), θ below max_memory_step,
    gradients no longer than max_surprise per token and head, without which a memory overshoots where tokens repeat;
    silu between the memory's layers and no residual inside; persistent tokens are keys and values of the attention
    (`PersistentTokens`) and are not written to the memory, whose learned start plays that role. Joined outputs are
    ``norm(y) ⊙ σ(norm(m))``: the paper names a non-linearity without saying which. Persistent keys stand at distance 0
    from every query, whatever the position does with distance.

    The loop over chunks stays outside compiled graphs, which would grow with the length. FLOPs are counted for one
    document in its chunked form, forward; packed rows cost more, since chunks then begin at any column and the columns
    are gone through twice.

    In an encoder, where the paper is causal only, a second memory of the same weights reads the row from the right: it
    begins at the document's last token, from which its chunks count, and positions keep their numbers. What the two
    say is averaged and not added, so that the learned start and a token's own surprise count once, and a norm that does
    not rescale meets what it meets in a decoder. The attention sees both sides, and convolutions are centred.

    State: 3 copies of the memory's weights in fp32 (the weights, the momentum, the chunk's beginning) whatever the
    length, and the attention's keys and values.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    def __init__(self, config: TitansConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal, self.num_ways = site.causal, 1 if site.causal else 2
        self.chunk_size, self.sliding_window = config.chunk_size, config.sliding_window
        self.num_heads, self.layer_idx = config.num_heads, site.layer_idx
        self.head_dim = config.head_dim or site.hidden_size // config.num_heads
        self.scale = self.head_dim**-0.5
        D, size = site.hidden_size, self.num_heads * self.head_dim
        self.q_proj = site.make_linear(D, size, role="attention")
        self.k_proj = site.make_linear(D, size, role="attention")
        self.v_proj = site.make_linear(D, size, role="attention")
        self.o_proj = site.make_linear(size, D, role="attention", residual_output=True)
        self.q_norm = site.make_norm(self.head_dim, config.qk_norm) if config.qk_norm else None
        self.k_norm = site.make_norm(self.head_dim, config.qk_norm) if config.qk_norm else None
        self.position: AttentionPosition = config.position.build(self.num_heads, self.head_dim)
        self.num_persistent = count = config.num_persistent_tokens
        self.persistent = PersistentTokens(count, self.num_heads, self.head_dim, site.init.std) if count else None
        self.memory = NeuralMemory(config, site, self.head_dim)
        self.memory_norm = site.make_norm(size)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: TitansState | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`."""
        assert self.causal or state is None, "an encoder has no state"
        documents = self._documents(x_BTD, ctx, state)
        mixed = self.mix(x_BTD, ctx, documents, state)
        if state is None:
            return PartOutput(mixed.y_BTD)
        assert documents is not None
        segment_B = documents.segment_B.to(state.segment_B.dtype)
        return PartOutput(mixed.y_BTD, TitansState(*mixed[1:], segment_B, documents.count_B))

    @abstractmethod
    def mix(self, x_BTD: Tensor, ctx: Context, documents: Documents | None, state: TitansState | None) -> Mixed:
        """What to add to the stream, and where memory and attention then stand."""

    def turned(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rows that the memory reads: in an encoder also those from right to left."""
        return x if self.causal else both_ways(x, dim)

    def heard(self, y_BTA: Tensor) -> Tensor:
        """What the positions get from `turned` rows [B or 2 B, T, …]: [B, T, …]."""
        return y_BTA if self.causal else mean_of_ways(y_BTA)

    def _documents(self, x_BTD: Tensor, ctx: Context, state: TitansState | None) -> Documents | None:
        """The documents of the `turned` rows; None when each is one, from its first token on, and the fast form may
        know that.
        """
        segments_BT = ctx.segment_ids_BT
        if state is not None:
            return documents_of(segments_BT, x_BTD.shape[1], state.segment_B, state.count_B)
        if segments_BT is None and self.kernels == "reference":
            segments_BT = torch.ones(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
        return documents_of(None if segments_BT is None else self.turned(segments_BT), x_BTD.shape[1], None)

    def read_memory(
        self, x_BTD: Tensor, ctx: Context, documents: Documents | None, state: TitansState | None
    ) -> tuple[Tensor, Memory, ConvState | None]:
        """The memory's normed answers [B, T, N·H] when it reads and writes x, and where it then stands."""
        conv = None if state is None else state.conv
        writing, conv = self.memory.writing(x_BTD, ctx.segment_ids_BT, conv, kernels=self.kernels)
        writing = Writing(*(self.turned(x, 2) for x in writing))
        before = self.memory.empty(len(writing.k_BNCH)) if state is None else state.memory
        read_BTA, memory = outside_graphs(self.memory.read)(writing, before, documents, kernels=self.kernels)
        return self.memory_norm(self.heard(read_BTA).to(x_BTD.dtype)), memory, conv

    def heads(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The attention's queries and keys, with norm and position, and values: each [B, T, N, H]."""
        projected = joint_linear(x_BTD, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = tables_for(self.position, ctx.tables, ctx.positions_BT)
        return self.position.encode(q, tables), self.position.encode(k, tables), v

    def nearness(self, device: torch.device) -> Nearness:
        """What distance does to the attention's scores."""
        return Nearness(self.position.slopes(device), self.position.rates(self.layer_idx, device))

    def prefix(self, like_BTNH: Tensor) -> Prefix:
        """The persistent keys and values, if any."""
        if self.persistent is not None:
            return self.persistent()
        none = like_BTNH.new_zeros((0, self.num_heads, self.head_dim))
        return Prefix(none, none)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Room for the memory, for what the attention keeps, and for the convolutions' last inputs."""
        conv = self.memory.conv
        return TitansState(
            self.memory.empty_state(batch_size, device=device, dtype=dtype),
            self.empty_near(batch_size, max_len, device=device, dtype=dtype),
            None if conv is None else conv.empty_state(batch_size, device=device, dtype=dtype),
            *(nothing_yet(batch_size, device) for _ in range(2)),
        )

    @abstractmethod
    def empty_near(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """What the attention keeps, before the first position."""
