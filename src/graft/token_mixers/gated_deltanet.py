"""The gated delta network's mixer as a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.ops.bidirectional import bidirectional_sum, own_values
from graft.ops.documents import Documents, documents_of, forgetting, nothing_yet
from graft.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_flops
from graft.ops.outside_graphs import outside_graphs
from graft.ops.short_conv import ConvState
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float
from graft.token_mixers.gated_deltanet_config import GatedDeltaNetConfig
from graft.token_mixers.short_conv import ShortConv

LENGTH_EPS = 1e-6
"""Added to the squared length of queries and keys before it divides them (Qwen3-Next's)."""


class GatedDeltaNetState(NamedTuple):
    """What the gated delta network carries.

    Args:
        memory_BNHF: the value heads' memories, fp32 or wider.
        conv: the inputs the convolution still sees.
        segment_B: number of the document under way; 0 = none yet.
    """

    memory_BNHF: Tensor
    conv: ConvState
    segment_B: Tensor


class Fading(nn.Module):
    """``log α = −exp(A_log) · softplus(a + dt_bias)`` per value head (Mamba2's, 2405.21060).

    At the start exp(A_log) is uniform in [0.01, 16] and softplus(dt_bias) log-uniform in [0.001, 0.1].
    """

    param_roles: Mapping[str, Role] = {"A_log": "scalar", "dt_bias": "scalar"}

    def __init__(self, num_heads: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))

    @torch.no_grad()
    def init_parameters(self, rng: Rng) -> None:
        if self.A_log.device.type == "meta":
            return
        shape = self.A_log.shape
        self.A_log.copy_(torch.empty(shape).uniform_(0.01, 16.0, generator=rng("A_log")).log())
        step = 0.001 * 100.0 ** torch.rand(shape, generator=rng("dt_bias"))
        self.dt_bias.copy_(step.double().expm1().log())

    def forward(self, a_BTN: Float[Tensor, "B T N"]) -> Float[Tensor, "B T N"]:
        """Logarithms of α, fp32 or wider."""
        wide = torch.promote_types(a_BTN.dtype, torch.float32)
        return -self.A_log.to(wide).exp() * F.softplus(a_BTN.to(wide) + self.dt_bias.to(wide))


class GatedDeltaNet(Part):
    """The mixer of gated delta networks: linear attention that fades its memory and corrects it key by key.

    ``S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / √H`` per value head, then
    ``W_o(norm(o) ⊙ silu(W_g x))``; q, k, v = silu(conv(projections)), q and k of length 1, β = sigmoid(W_b x), α from
    `Fading`. Each head of q and k serves num_v_heads / num_k_heads value heads in a row.

    Source: Gated Delta Networks (2412.06464, section 3); the value heads, the scale 1/√H and the order of norm and gate
    are Qwen3-Next's. Deviations: the heads' norm is the model's unless ``head_norm`` says otherwise (the paper:
    RMSNorm); no negative eigenvalues (β stays below 1). In an encoder (the paper is causal only) the convolution is
    centred and the recurrence runs both ways with the same weights; the two ``o`` are added, with what a position reads
    of its own value, ``β_t (q_t · k_t) v_t / √H`` in either, counted once. The corrections are not separable: each way
    corrects what it alone has read.

    The memory is fp32 or wider. The fast form works in chunks (`graft.ops.gated_delta_rule`), the reference is the
    recurrence; a document begins with an empty memory.

    State: N·H·F_v fp32 numbers, ``kernel_size − 1`` inputs of 2·K·H + N·F_v channels with a document number each, and
    one more document number; whatever the length (F_v: channels of a value). FLOPs: see `flops_per_token`.
    """

    def __init__(self, config: GatedDeltaNetConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal = site.causal
        self.num_k_heads, self.head_dim = config.num_k_heads, config.head_dim
        self.num_v_heads = config.num_v_heads or config.num_k_heads
        self.v_head_dim = config.v_head_dim or config.head_dim
        D, keys, values = site.hidden_size, self.num_k_heads * self.head_dim, self.num_v_heads * self.v_head_dim
        self.q_proj = site.make_linear(D, keys, role="recurrence")
        self.k_proj = site.make_linear(D, keys, role="recurrence")
        self.v_proj = site.make_linear(D, values, role="recurrence")
        self.gate_proj = site.make_linear(D, values, role="recurrence")
        self.a_proj = site.make_linear(D, self.num_v_heads, role="recurrence")
        self.b_proj = site.make_linear(D, self.num_v_heads, role="recurrence")
        self.conv = ShortConv(2 * keys + values, config.kernel_size, causal=site.causal)
        self.fading = Fading(self.num_v_heads)
        self.head_norm = site.make_norm(self.v_head_dim, config.head_norm)
        self.o_proj = site.make_linear(values, D, role="recurrence", residual_output=True)

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: GatedDeltaNetState | None = None
    ) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        conv_state = None if state is None else state.conv
        q_BTNH, k_BTNH, v_BTNF, conv_state = self._read(x_BTD, ctx.segment_ids_BT, conv_state)
        beta_BTN = torch.sigmoid(self.b_proj(x_BTD))
        tensors = (q_BTNH, k_BTNH, v_BTNF, self.fading(self.a_proj(x_BTD)), beta_BTN)
        if not self.causal:
            assert state is None, "an encoder has no state"
            o_BTNF = bidirectional_sum(lambda *given: self._one_way(*given)[0], tensors, ctx.segment_ids_BT)
            own_BTNF = beta_BTN[..., None] * own_values(q_BTNH, k_BTNH, v_BTNF)
            return PartOutput(self._out(x_BTD, (o_BTNF - own_BTNF).to(v_BTNF.dtype)))
        documents = documents_of(ctx.segment_ids_BT, x_BTD.shape[1], None if state is None else state.segment_B)
        o_BTNF, memory_BNHF = self._one_way(*tensors, documents, state)
        if state is not None:
            assert documents is not None
            assert conv_state is not None
            assert memory_BNHF is not None
            state = GatedDeltaNetState(memory_BNHF.to(state.memory_BNHF.dtype), conv_state, documents.segment_B)
        return PartOutput(self._out(x_BTD, o_BTNF), state)

    def _one_way(
        self,
        q_BTNH: Tensor,
        k_BTNH: Tensor,
        v_BTNF: Tensor,
        log_decay_BTN: Tensor,
        beta_BTN: Tensor,
        documents: Documents | None,
        state: GatedDeltaNetState | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads from the first position to the last [B, T, N, F], and the memory (None from another's kernel)."""
        log_decay_BTN = forgetting(log_decay_BTN, documents)
        if documents is not None:
            beta_BTN = beta_BTN.masked_fill(~documents.real_BT[..., None], 0.0)
        tensors = (q_BTNH, k_BTNH, v_BTNF, log_decay_BTN, beta_BTN)
        if self.kernel is not None and state is None:
            return outside_graphs(self.kernel.run)(*tensors, documents), None
        return gated_delta_rule(*tensors, None if state is None else state.memory_BNHF, kernels=self.kernels)

    def _out(self, x_BTD: Tensor, o_BTNF: Tensor) -> Tensor:
        """The heads normed, gated and projected."""
        return self.o_proj(self.head_norm(o_BTNF).flatten(-2) * F.silu(self.gate_proj(x_BTD)))

    def _read(
        self, x_BTD: Tensor, segment_ids_BT: Tensor | None, state: ConvState | None
    ) -> tuple[Tensor, Tensor, Tensor, ConvState | None]:
        """Queries (scaled) and keys, a head for every value head, and values; and the convolution's state."""
        projected = torch.cat([proj(x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        mixed, state = self.conv(projected, segment_ids_BT, state, kernels=self.kernels)
        keys = self.num_k_heads * self.head_dim
        q, k, v = F.silu(mixed).split((keys, keys, self.num_v_heads * self.v_head_dim), dim=-1)
        q_BTKH, k_BTKH = (_of_length_one(z.unflatten(-1, (self.num_k_heads, -1))) for z in (q, k))
        group = self.num_v_heads // self.num_k_heads
        q_BTNH, k_BTNH = (z.repeat_interleave(group, dim=2) for z in (q_BTKH * self.head_dim**-0.5, k_BTKH))
        return q_BTNH, k_BTNH, v.unflatten(-1, (self.num_v_heads, -1)), state

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zeros, whatever ``max_len``."""
        shape = (batch_size, self.num_v_heads, self.head_dim, self.v_head_dim)
        memory_BNHF = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        conv = self.conv.empty_state(batch_size, device=device, dtype=dtype)
        return GatedDeltaNetState(memory_BNHF, conv, nothing_yet(batch_size, device))

    def flops_per_token(self, seq_len: int) -> float:
        """2 per weight of the projections, and the products of the chunked form, twice in an encoder.

        Per value head: 5·C·H + 3·C·F_v for the pairs of a chunk of C positions and its triangular system, and 6·H·F_v
        for the memory; a step of decoding is a chunk of one. The same for every length that fills its chunks. The
        convolution is no matrix product.
        """
        products = gated_delta_rule_flops(
            seq_len, num_heads=self.num_v_heads, head_dim=self.head_dim, value_dim=self.v_head_dim
        )
        return linear_flops(self) + products * (1 if self.causal else 2)


def _of_length_one(x_BTKH: Tensor) -> Tensor:
    """Every head divided by its length, fp32 or wider."""
    wide = x_BTKH.to(torch.promote_types(x_BTKH.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + LENGTH_EPS)
