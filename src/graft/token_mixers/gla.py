"""Gated linear attention as a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.bidirectional import bidirectional_sum, own_values
from graft.ops.documents import Documents, documents_of, forgetting, nothing_yet
from graft.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_flops
from graft.ops.outside_graphs import outside_graphs
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float
from graft.token_mixers.gla_config import GLAConfig


class GLAState(NamedTuple):
    """What gated linear attention carries.

    Args:
        memory_BNHF: the heads' memories, fp32 or wider.
        segment_B: number of the document under way; 0 = none yet.
    """

    memory_BNHF: Tensor
    segment_B: Tensor


class GLA(Part):
    """Gated linear attention: ``W_o(norm(o) ⊙ swish(W_g x))`` over heads with a memory that decays channel by channel.

    Per head ``S_t = diag(α_t) S_{t-1} + k_t v_tᵀ`` and ``o_t = S_tᵀ q_t / √H``, with
    ``α = sigmoid(W_2 W_1 x + b)^(1/τ)``, one factor per channel of the keys.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training (2312.06635, section 4.4).
    Deviations: the output gate has no bias; the heads' norm is the model's unless ``head_norm`` says otherwise (the
    paper: LayerNorm); in an encoder (the paper is causal only) the recurrence runs both ways with the same weights, the
    two ``o`` added and each position's own term ``(q_t · k_t) v_t / √H`` counted once.

    The memory is fp32 or wider. The fast form works in chunks (`graft.ops.gated_linear_attention`), the reference is
    the recurrence; a document begins with an empty memory.

    State: N·H·F_v fp32 numbers and a document number, whatever the length (F_v: channels of a head's values).
    FLOPs: see `flops_per_token`.
    """

    def __init__(self, config: GLAConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal = site.causal
        self.temperature = config.gate_temperature
        D, self.num_heads = site.hidden_size, config.num_heads
        self.head_dim = config.head_dim or D // 2 // self.num_heads
        self.v_head_dim = config.v_head_dim or D // self.num_heads
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        self.q_proj = site.make_linear(D, keys, role="recurrence")
        self.k_proj = site.make_linear(D, keys, role="recurrence")
        self.v_proj = site.make_linear(D, values, role="recurrence")
        self.gate_proj = site.make_linear(D, values, role="recurrence")
        self.decay_down_proj = site.make_linear(D, config.gate_low_rank_dim, role="recurrence")
        self.decay_up_proj = site.make_linear(config.gate_low_rank_dim, keys, role="recurrence", bias=True)
        self.head_norm = site.make_norm(self.v_head_dim, config.head_norm)
        self.o_proj = site.make_linear(values, D, role="recurrence", residual_output=True)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: GLAState | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        heads = (self.num_heads, -1)
        q_BTNH, k_BTNH = (proj(x_BTD).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj))
        v_BTNF = self.v_proj(x_BTD).unflatten(-1, heads)
        tensors = (q_BTNH * self.head_dim**-0.5, k_BTNH, v_BTNF, self._log_decay(x_BTD).unflatten(-1, heads))
        if not self.causal:
            assert state is None, "an encoder has no state"
            o_BTNF = bidirectional_sum(lambda *given: self._one_way(*given)[0], tensors, ctx.segment_ids_BT)
            return PartOutput(self._out(x_BTD, (o_BTNF - own_values(*tensors[:3])).to(v_BTNF.dtype)))
        documents = documents_of(ctx.segment_ids_BT, x_BTD.shape[1], None if state is None else state.segment_B)
        o_BTNF, memory_BNHF = self._one_way(*tensors, documents, state)
        if state is not None:
            assert documents is not None
            assert memory_BNHF is not None
            state = GLAState(memory_BNHF.to(state.memory_BNHF.dtype), documents.segment_B)
        return PartOutput(self._out(x_BTD, o_BTNF), state)

    def _one_way(
        self,
        q_BTNH: Tensor,
        k_BTNH: Tensor,
        v_BTNF: Tensor,
        log_decay_BTNH: Tensor,
        documents: Documents | None,
        state: GLAState | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads from the first position to the last [B, T, N, F], and the memory (None from another's kernel)."""
        log_decay_BTNH = forgetting(log_decay_BTNH, documents)
        if documents is not None:
            k_BTNH = k_BTNH.masked_fill(~documents.real_BT[..., None, None], 0.0)
        if self.kernel is not None and state is None:
            return outside_graphs(self.kernel.run)(q_BTNH, k_BTNH, v_BTNF, log_decay_BTNH, documents), None
        before = None if state is None else state.memory_BNHF
        return gated_linear_attention(q_BTNH, k_BTNH, v_BTNF, log_decay_BTNH, before, kernels=self.kernels)

    def _out(self, x_BTD: Tensor, o_BTNF: Tensor) -> Tensor:
        """The heads normed, gated and projected."""
        return self.o_proj(self.head_norm(o_BTNF).flatten(-2) * F.silu(self.gate_proj(x_BTD)))

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        """Logarithms of the decays, fp32 or wider."""
        gate = self.decay_up_proj(self.decay_down_proj(x_BTD))
        return F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / self.temperature

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zeros, whatever ``max_len``."""
        shape = (batch_size, self.num_heads, self.head_dim, self.v_head_dim)
        memory_BNHF = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return GLAState(memory_BNHF, nothing_yet(batch_size, device))

    def flops_per_token(self, seq_len: int) -> float:
        """2 per weight of the projections, and the products of the chunked form, twice in an encoder.

        Per head: (C − 1)·H + 2·C·F_v for the pairs of a chunk of C positions and 4·H·F_v for the memory; a step of
        decoding needs the latter alone. The same for every length that fills its chunks.
        """
        products = gated_linear_attention_flops(
            seq_len, num_heads=self.num_heads, head_dim=self.head_dim, value_dim=self.v_head_dim
        )
        return linear_flops(self) + products * (1 if self.causal else 2)
