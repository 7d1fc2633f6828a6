"""Gated linear attention as a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.documents import documents_of, forgetting, nothing_yet
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
    paper: LayerNorm).

    The memory is fp32 or wider. The fast form works in chunks (`graft.ops.gated_linear_attention`), the reference is
    the recurrence; a document begins with an empty memory. Causal only.

    State: N·H·F_v fp32 numbers and a document number, whatever the length (F_v: channels of a head's values).
    FLOPs: see `flops_per_token`.
    """

    def __init__(self, config: GLAConfig, site: Site):
        super().__init__()
        self.config = config
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
        assert ctx.causal, "the recurrence has one direction"
        documents = documents_of(ctx.segment_ids_BT, x_BTD.shape[1], None if state is None else state.segment_B)
        heads = (self.num_heads, -1)
        q_BTNH, k_BTNH = (proj(x_BTD).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj))
        v_BTNF = self.v_proj(x_BTD).unflatten(-1, heads)
        log_decay_BTNH = forgetting(self._log_decay(x_BTD).unflatten(-1, heads), documents)
        if documents is not None:
            k_BTNH = k_BTNH.masked_fill(~documents.real_BT[..., None, None], 0.0)
        q_BTNH = q_BTNH * self.head_dim**-0.5
        if self.kernel is not None and state is None:
            o_BTNF = outside_graphs(self.kernel.run)(q_BTNH, k_BTNH, v_BTNF, log_decay_BTNH, documents)
        else:
            before = None if state is None else state.memory_BNHF
            o_BTNF, memory_BNHF = gated_linear_attention(
                q_BTNH, k_BTNH, v_BTNF, log_decay_BTNH, before, kernels=self.kernels
            )
            if state is not None:
                assert documents is not None
                state = GLAState(memory_BNHF.to(state.memory_BNHF.dtype), documents.segment_B)
        return PartOutput(self.o_proj(self.head_norm(o_BTNF).flatten(-2) * F.silu(self.gate_proj(x_BTD))), state)

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
        """2 per weight of the projections, and the products of the chunked form, which trains and prefills.

        Per head: (C − 1)·H + 2·C·F_v for the pairs of a chunk of C positions and 4·H·F_v for the memory; a step of
        decoding needs the latter alone. The same for every length that fills its chunks.
        """
        products = gated_linear_attention_flops(
            seq_len, num_heads=self.num_heads, head_dim=self.head_dim, value_dim=self.v_head_dim
        )
        return linear_flops(self) + products
