"""Multi-head latent attention as a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.linears.dense import Dense
from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.part import Context, Part, PartOutput, Site, linear_flops
from graft.positions.base import AttentionPosition, tables_for
from graft.shapes import Float
from graft.token_mixers.heads import visible_pairs
from graft.token_mixers.kv_state import KVState, extend
from graft.token_mixers.mla_config import MLAConfig


class Queries(NamedTuple):
    """Queries of T positions.

    Args:
        nope_BTNH: channels without position.
        rope_BTNH: rotated channels.
        segments_BT: document numbers, 0 = padding; None = one document.
    """

    nope_BTNH: Tensor
    rope_BTNH: Tensor
    segments_BT: Tensor | None


class Latents(NamedTuple):
    """What S positions are remembered by.

    Args:
        c_BSR: the normed latents that keys and values are made of.
        rope_BSH: the rotated key that all heads share.
        segments_BS: document numbers; None = one document.
        offset: index of the first query among these positions; None = queries are the last of them.
        all_seen: they are in any order, none of them later than the (single) query.
    """

    c_BSR: Tensor
    rope_BSH: Tensor
    segments_BS: Tensor | None
    offset: int | None = None
    all_seen: bool = False


class MLA(Part):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; unchanged in DeepSeek-V3, 2412.19437).

    A position is remembered by a latent ``c = norm(W_DKV x)`` and one rotated key k_R that all heads share; head n has
    the key ``[W_UK_n c; k_R]`` and the value ``W_UV_n c``. Queries are ``[W_UQ c_q; rotate(W_QR c_q)]`` with
    ``c_q = norm(W_DQ x)``, or made of x directly. Parameters are named as in the published weights: q_a_proj = W_DQ,
    q_b_proj = W_UQ and W_QR (q_proj when direct), kv_a_proj_with_mqa = W_DKV and the shared key, kv_b_proj = W_UK and
    W_UV, o_proj. DeepSeek rotates channels (2i, 2i + 1); its weights fit as they are with ``rope_interleave``.

    Two forms with the same scale give the same numbers. *Expanded* makes keys and values of all heads: for training and
    prefills. *Absorbed* multiplies W_UK into the query and W_UV into the result instead, so that every head attends to
    the latents themselves, as multi-query attention; taken while decoding when it costs less. ``kernels: reference``
    always expands, and so do linear maps other than plain ones, whose matrix alone does not say what they compute.

    Deviations: a sliding window, both directions, and positions that fade with distance (xpos, hope) in place of plain
    rotations, under which channels without position do not fade; YaRN's mscale and mscale_all_dim act as in the code
    published with DeepSeek-V2: both default to YaRN's own behaviour, and either may be set alone.

    State: latent and rotated key, kv_lora_rank + qk_rope_head_dim numbers per position kept (and one integer once
    documents are told apart). FLOPs: see `flops_per_token`.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    def __init__(self, config: MLAConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal, self.layer_idx = site.causal, site.layer_idx
        self.num_heads, self.sliding_window = config.num_heads, config.sliding_window
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_head_dim, self.rope_interleave = config.v_head_dim, config.rope_interleave
        D, N, rank = site.hidden_size, config.num_heads, config.kv_lora_rank
        q_size = N * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = site.make_linear(D, q_size, role="attention")
        else:
            self.q_a_proj = site.make_linear(D, config.q_lora_rank, role="attention")
            self.q_a_layernorm = site.make_norm(config.q_lora_rank, config.latent_norm)
            self.q_b_proj = site.make_linear(config.q_lora_rank, q_size, role="attention")
        self.kv_a_proj_with_mqa = site.make_linear(D, rank + config.qk_rope_head_dim, role="attention")
        self.kv_a_layernorm = site.make_norm(rank, config.latent_norm)
        self.kv_b_proj = site.make_linear(rank, N * (config.qk_nope_head_dim + config.v_head_dim), role="attention")
        self.o_proj = site.make_linear(N * config.v_head_dim, D, role="attention", residual_output=True)
        self.position: AttentionPosition = config.built_position().build(N, config.qk_rope_head_dim)
        self.scale = config.scale()

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: KVState | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        queries, latents = self.project(x_BTD, ctx)
        if state is None:
            return PartOutput(self._output(self.expanded(queries, latents, causal=ctx.causal)))
        assert ctx.causal, "an encoder has no state"
        queries, latents, state = self._remember(queries, latents, state)
        attend = self.absorbed if self._absorbs(x_BTD.shape[1], latents.c_BSR.shape[1]) else self.expanded
        return PartOutput(self._output(attend(queries, latents, causal=True)), state)

    def project(self, x_BTD: Tensor, ctx: Context) -> tuple[Queries, Latents]:
        """Queries and latents of the positions in ``x_BTD``, rotations worked in."""
        q = self._queries(x_BTD).unflatten(-1, (self.num_heads, -1))
        q_nope_BTNH, q_rope_BTNH = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        c_BTR, k_rope_BTH = self.kv_a_proj_with_mqa(x_BTD).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        tables = tables_for(self.position, ctx.tables, ctx.positions_BT)
        q_rope_BTNH, k_rope_BT1H = (
            self.position.encode(_halves(x) if self.rope_interleave else x, tables)
            for x in (q_rope_BTNH, k_rope_BTH.unsqueeze(2))
        )
        segments_BT = ctx.segment_ids_BT
        latents = Latents(self.kv_a_layernorm(c_BTR), k_rope_BT1H.squeeze(2), segments_BT)
        return Queries(q_nope_BTNH, q_rope_BTNH, segments_BT), latents

    def _queries(self, x_BTD: Tensor) -> Tensor:
        """[B, T, N · channels per head], made of the stream or of its latent."""
        if self.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))

    def expanded(self, queries: Queries, latents: Latents, *, causal: bool) -> Tensor:
        """[B, T, N, v_head_dim]: attention with the keys and values of every head spelled out."""
        kv_BSNH = self.kv_b_proj(latents.c_BSR).unflatten(-1, (self.num_heads, -1))
        k_nope_BSNH, v_BSNH = kv_BSNH.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope_BSNH = latents.rope_BSH.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        k_BSNH = torch.cat((k_nope_BSNH, k_rope_BSNH.to(k_nope_BSNH.dtype)), dim=-1)
        q_BTNH = torch.cat((queries.nope_BTNH, queries.rope_BTNH), dim=-1)
        return self._attend(q_BTNH, k_BSNH, v_BSNH, queries, latents, causal)

    def absorbed(self, queries: Queries, latents: Latents, *, causal: bool) -> Tensor:
        """`expanded` by attending to the latents: ``q·(W_UK c) = (W_UKᵀ q)·c``, ``Σ p W_UV c = W_UV Σ p c``."""
        assert isinstance(self.kv_b_proj, nn.Linear)
        weight_NHR = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_k_NHR, up_v_NHR = weight_NHR.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_BTNR = torch.einsum("btnh,nhr->btnr", queries.nope_BTNH, up_k_NHR)
        q_BTNH = torch.cat((q_BTNR, queries.rope_BTNH.to(q_BTNR.dtype)), dim=-1)
        c_BS1R = latents.c_BSR.unsqueeze(2)
        k_BS1H = torch.cat((c_BS1R, latents.rope_BSH.unsqueeze(2)), dim=-1)
        o_BTNR = self._attend(q_BTNH, k_BS1H, c_BS1R, queries, latents, causal)
        return torch.einsum("btnr,nhr->btnh", o_BTNR, up_v_NHR)

    def _rates(self, channels: int, device: torch.device) -> Tensor | None:
        """The rates at which ``channels`` of q·k fade with distance, those without position first; None = none does."""
        rates_H = self.position.rates(self.layer_idx, device)
        return None if rates_H is None else F.pad(rates_H, (channels - len(rates_H), 0))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Queries, latents: Latents, causal: bool) -> Tensor:
        offset = k.shape[1] - q.shape[1] if latents.offset is None else latents.offset
        causal = causal and not latents.all_seen
        visibility = Visibility(causal, self.sliding_window, offset, queries.segments_BT, latents.segments_BS)
        scoring = Scoring(self.scale, rates_H=self._rates(q.shape[-1], q.device))
        return attention(q, k.to(q.dtype), v.to(q.dtype), visibility, scoring, kernels=self.kernels)

    def _output(self, o_BTNH: Tensor) -> Tensor:
        return self.o_proj(o_BTNH.flatten(-2))

    def _absorbs(self, num_queries: int, num_keys: int) -> bool:
        """Whether the absorbed form takes fewer multiplications (see the class for when it is out of the question)."""
        if self.kernels == "reference" or type(self.kv_b_proj) is not Dense:
            return False
        channels = self.qk_nope_head_dim + self.v_head_dim
        pairs = num_queries * num_keys
        absorbed = num_queries * self.kv_lora_rank * channels + pairs * 2 * self.kv_lora_rank
        return absorbed <= num_keys * self.kv_lora_rank * channels + pairs * channels

    def _remember(self, queries: Queries, new: Latents, state: KVState) -> tuple[Queries, Latents, KVState]:
        """Adds the new positions to the state; gives the queries and all that they may see."""
        c_BT1R, rope_BT1H = new.c_BSR.unsqueeze(2), new.rope_BSH.unsqueeze(2)
        window = self.sliding_window
        any_order = self._rates(self.qk_rope_head_dim, c_BT1R.device) is None
        kept, state = extend(state, c_BT1R, rope_BT1H, new.segments_BS, window=window, any_order=any_order)
        queries = queries._replace(segments_BT=kept.query_segments_BT)
        dtype = new.c_BSR.dtype
        c_BSR, rope_BSH = (x.squeeze(2).to(dtype) for x in (kept.k_BSKH, kept.v_BSKH))
        return queries, Latents(c_BSR, rope_BSH, kept.segments_BS, kept.offset, kept.all_seen), state

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> KVState:
        """Room for ``max_len`` positions, or for ``sliding_window`` if that is fewer: latents as keys of one head,
        rotated keys as its values.
        """
        capacity = min(self.sliding_window or max_len, max_len)
        sizes = (self.kv_lora_rank, self.qk_rope_head_dim)
        c_B1SR, rope_B1SH = (torch.zeros(batch_size, 1, capacity, n, device=device, dtype=dtype) for n in sizes)
        return KVState(c_B1SR, rope_B1SH, None, 0)

    def flops_per_token(self, seq_len: int) -> float:
        """Of the expanded form, exactly: 2 per weight of the projections, and 2·N·(qk_nope_head_dim + qk_rope_head_dim
        + v_head_dim) per visible pair.
        """
        pairs = visible_pairs(seq_len, self.sliding_window, causal=self.causal)
        channels = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return linear_flops(self) + 2 * self.num_heads * channels * pairs / seq_len


def _halves(x: Tensor) -> Tensor:
    """Channels (0, 1, 2, 3, …) in the order (0, 2, …, 1, 3, …), which makes pairs (2i, 2i + 1) pairs (i, i + r/2)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
