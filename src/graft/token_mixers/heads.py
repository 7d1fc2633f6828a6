"""What all attention over heads shares: projections, head norms, positions, and the keys and values it keeps."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from graft.linears.joint import joint_linear
from graft.ops.attention_mask import Visibility
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.positions.base import AttentionPosition, tables_for
from graft.shapes import Float
from graft.token_mixers.heads_config import HeadsConfig
from graft.token_mixers.kv_state import KVState, empty_state, extend, visibility_of
from graft.token_mixers.value_residual import VALUE_RESIDUAL, ValueResidual


class MultiHead(Part):
    """Base of attention over heads: ``o_proj(attend(q, k, v))``; a subclass says in `attend` how values are weighed.

    The order is: projections, qk-norm per head (2302.05442), position, value residual, `attend`.

    State: keys and values of all positions, or of the last ``sliding_window``: 2·K·H numbers per position kept (and one
    integer once documents are told apart). FLOPs: see `flops_per_token`.

    Args:
        config: heads, window, position, norms, biases.
        site: the surroundings.
    """

    def __init__(self, config: HeadsConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal = site.causal
        self.layer_idx = site.layer_idx
        self.sliding_window = config.sliding_window
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or site.hidden_size // config.num_heads
        D, q_size, kv_size = site.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = site.make_linear(D, q_size, role="attention", bias=config.qkv_bias)
        self.k_proj = site.make_linear(D, kv_size, role="attention", bias=config.qkv_bias)
        self.v_proj = site.make_linear(D, kv_size, role="attention", bias=config.qkv_bias)
        self.o_proj = site.make_linear(q_size, D, role="attention", bias=config.output_bias, residual_output=True)
        self.q_norm = site.make_norm(self.head_dim, config.qk_norm) if config.qk_norm else None
        self.k_norm = site.make_norm(self.head_dim, config.qk_norm) if config.qk_norm else None
        self.position: AttentionPosition = config.position.build(self.num_heads, self.head_dim)
        self.value_residual = ValueResidual() if config.value_residual else None

    @abstractmethod
    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility) -> Tensor:
        """Values weighed by what queries make of keys: [B, T, N, H].

        Args:
            q_BTNH: queries, norm and position worked in.
            k_BSKH: keys, alike.
            v_BSKH: values.
            visibility: which keys a query sees.
        """

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: KVState | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, ctx)
        published: dict[str, Tensor] = {}
        if self.value_residual is not None:
            first_BTKH = ctx.published.get(VALUE_RESIDUAL)
            if first_BTKH is None:
                published[VALUE_RESIDUAL] = first_BTKH = v_BTKH
            v_BTKH = self.value_residual(v_BTKH, first_BTKH)
        if state is None:
            segments_BT = ctx.segment_ids_BT
            visibility = Visibility(ctx.causal, self.sliding_window, 0, segments_BT, segments_BT)
            o_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, visibility)
        else:
            assert ctx.causal, "an encoder has no state"
            o_BTNH, state = self._decode(q_BTNH, k_BTKH, v_BTKH, ctx.segment_ids_BT, state)
        return PartOutput(self.o_proj(o_BTNH.flatten(-2)), state, {}, published)

    def project(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with norm and position worked in, and values."""
        projected = joint_linear(x_BTD, (self.q_proj, self.k_proj, self.v_proj))
        q_BTNH, k_BTKH, v_BTKH = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        tables = tables_for(self.position, ctx.tables, ctx.positions_BT)
        return self.position.encode(q_BTNH, tables), self.position.encode(k_BTKH, tables), v_BTKH

    def _decode(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, segments_BT: Tensor | None, state: KVState
    ) -> tuple[Tensor, KVState]:
        """Attends from the new positions to everything they may see, and keeps their keys and values."""
        window, dtype = self.sliding_window, q_BTNH.dtype
        any_order = all(term is None for term in self.distance_terms(q_BTNH.device))
        keys, state = extend(state, k_BTKH, v_BTKH, segments_BT, window=window, any_order=any_order)
        return self.attend(q_BTNH, keys.k_BSKH.to(dtype), keys.v_BSKH.to(dtype), visibility_of(keys, window)), state

    def distance_terms(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What distance does to scores: slopes [N] and rates [H], see `graft.positions.base.AttentionPosition`."""
        return self.position.slopes(device), self.position.rates(self.layer_idx, device)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Room for ``max_len`` positions, or for ``sliding_window`` if that is fewer."""
        capacity = min(self.sliding_window or max_len, max_len)
        return empty_state(batch_size, self.num_kv_heads, capacity, self.head_dim, device=device, dtype=dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """2 per weight of the projections, and 4·N·H per visible pair (scores, and values): both exact."""
        pairs = visible_pairs(seq_len, self.sliding_window, causal=self.causal)
        return linear_flops(self) + 4 * self.num_heads * self.head_dim * pairs / seq_len


def visible_pairs(seq_len: int, window: int | None, *, causal: bool) -> int:
    """How many (query, key) pairs one document of ``seq_len`` positions has."""
    reach = min(window or seq_len, seq_len)  # keys seen to the left, the query itself included
    one_side = reach * seq_len - reach * (reach - 1) // 2
    return one_side if causal else 2 * one_side - seq_len
