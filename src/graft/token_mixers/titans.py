"""Titans as parts: memory as gate, memory as layer, and the choice of the form."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.ops.documents import Documents
from graft.ops.prefix_attention import prefix_attention, window_attention
from graft.part import Context, Part, Site, State, linear_flops
from graft.token_mixers.attention_config import AttentionConfig
from graft.token_mixers.heads import visible_pairs
from graft.token_mixers.kv_state import KVState, empty_state, extend, visibility_of
from graft.token_mixers.titans_base import Mixed, Titans, TitansState
from graft.token_mixers.titans_config import TitansConfig
from graft.token_mixers.titans_context import MemoryAsContext


class SlidingTitans(Titans):
    """A form whose attention slides: to the last ``sliding_window`` positions, itself included (in an encoder to the
    next as well), and the persistent tokens.
    """

    def slide(self, x_BTD: Tensor, ctx: Context, state: TitansState | None) -> tuple[Tensor, KVState | None]:
        """Attention's answers [B, T, N·H] and what it then keeps."""
        window = self.sliding_window
        assert window is not None, "the config asks for it"
        q, k, v = self.heads(x_BTD, ctx)
        nearness = self.nearness(q.device)
        prefix, segments_BT = self.prefix(q), ctx.segment_ids_BT
        if state is None:
            y_BTNH = window_attention(
                q, k, v, prefix, scale=self.scale, window=window, segment_ids_BT=segments_BT, nearness=nearness,
                causal=self.causal, kernels=self.kernels,
            )  # fmt: skip
            return y_BTNH.flatten(-2), None
        keys, near = extend(state.near, k, v, segments_BT, window=window, any_order=False)
        T, S = q.shape[1], keys.k_BSKH.shape[1]
        seen = visibility_of(keys, window).block(0, T, 0, S, q.device)
        assert seen is not None
        y_BTNH = prefix_attention(
            q, keys.k_BSKH.to(q.dtype), keys.v_BSKH.to(q.dtype), prefix, scale=self.scale, seen_BTS=seen,
            nearness=nearness._replace(first_query=keys.offset), kernels=self.kernels,
        )  # fmt: skip
        return y_BTNH.flatten(-2), near

    def empty_near(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Room for ``sliding_window`` positions, or for all if that is fewer."""
        capacity = min(self.sliding_window or max_len, max_len)
        return empty_state(batch_size, self.num_heads, capacity, self.head_dim, device=device, dtype=dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """Projections; the memory in its chunked form, in an encoder twice; 4·N·H per pair of a query and a key it
        sees. All exact.
        """
        pairs = visible_pairs(seq_len, self.sliding_window, causal=self.causal)
        near = pairs / seq_len + self.num_persistent
        scans = self.num_ways * self.memory.scan_flops(seq_len) / seq_len
        return linear_flops(self) + scans + 4 * self.num_heads * self.head_dim * near


class MemoryAsGate(SlidingTitans):
    """Titans, memory as a gate (MAG, section 4.2): ``o_proj(norm(attention(x)) ⊙ σ(norm(memory(x))))``."""

    def __init__(self, config: TitansConfig, site: Site):
        super().__init__(config, site)
        self.attention_norm = site.make_norm(self.num_heads * self.head_dim)

    def mix(self, x_BTD: Tensor, ctx: Context, documents: Documents | None, state: TitansState | None) -> Mixed:
        y_BTA, near = self.slide(x_BTD, ctx, state)
        read_BTA, memory, conv = self.read_memory(x_BTD, ctx, documents, state)
        return Mixed(self.o_proj(self.attention_norm(y_BTA) * read_BTA.sigmoid()), memory, near, conv)


class MemoryAsLayer(SlidingTitans):
    """Titans, memory as a layer (MAL, section 4.3): ``o_proj(attention(y_proj(norm(memory(x)))))``.

    As in the paper nothing goes around the memory but the residual branch.
    """

    def __init__(self, config: TitansConfig, site: Site):
        super().__init__(config, site)
        self.y_proj = site.make_linear(self.num_heads * self.head_dim, site.hidden_size, role="titans")

    def mix(self, x_BTD: Tensor, ctx: Context, documents: Documents | None, state: TitansState | None) -> Mixed:
        read_BTA, memory, conv = self.read_memory(x_BTD, ctx, documents, state)
        y_BTA, near = self.slide(self.y_proj(read_BTA), ctx, state)
        return Mixed(self.o_proj(y_BTA), memory, near, conv)


FORMS: dict[str, type[Titans]] = {"mac": MemoryAsContext, "mag": MemoryAsGate, "mal": MemoryAsLayer}


def build_titans(config: TitansConfig, site: Site) -> Part:
    """The part of a config's form; without a memory what is left of Titans is softmax attention."""
    if config.neural_memory:
        return FORMS[config.form](config, site)
    shared = ("num_heads", "head_dim", "sliding_window", "position", "qk_norm")
    return AttentionConfig(**{name: getattr(config, name) for name in shared}).build(site)
