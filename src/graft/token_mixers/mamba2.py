"""Mamba-2 as a part. In shapes, F stands for the channels of a head and H for those of B and C (d_state), as in
`graft.ops.decay_attention`; I is the inner width."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.ops.decay_attention import bidirectional_decay_attention, chunked_flops, decay_attention
from graft.ops.documents import Documents, continued_segments, documents_of
from graft.ops.outside_graphs import outside_graphs
from graft.ops.short_conv import ConvState
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float
from graft.token_mixers.decay_state import DecayState, empty_decay_state
from graft.token_mixers.mamba2_config import Mamba2Config
from graft.token_mixers.short_conv import ShortConv


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer carries.

    Args:
        conv: the last inputs of the convolution.
        scan: the state of the scan.
    """

    conv: ConvState
    scan: DecayState


class GatedNorm(nn.Module):
    """``w ⊙ rms_norm(x ⊙ silu(z))``, each group of channels by itself, in fp32 or wider.

    Args:
        size: channels.
        num_groups: groups they are normed in.
        eps: added to the mean square.
    """

    role: Role = "norm"

    def __init__(self, size: int, num_groups: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.empty(size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x_BTI: Float[Tensor, "B T I"], z_BTI: Float[Tensor, "B T I"]) -> Float[Tensor, "B T I"]:
        """[B, T, I] in the dtype of z."""
        wide = torch.promote_types(z_BTI.dtype, torch.float32)
        gated = (x_BTI.to(wide) * F.silu(z_BTI.to(wide))).unflatten(-1, (self.num_groups, -1))
        normed_BTI = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return normed_BTI.to(z_BTI.dtype) * self.weight.to(z_BTI.dtype)


class Mamba2(Part):
    """The mixer of Mamba-2 (SSD, arXiv 2405.21060, sections 6 and 7): a selective state space with scalar fading.

    ``z, x, B, C, dt = in_proj(u)``; x, B and C go through a short causal convolution and silu; with
    ``Δ = softplus(dt + dt_bias)`` and ``a = exp(−Δ exp(A_log))`` each head keeps ``S_t = a_t S_{t-1} + Δ_t B_t x_tᵀ``
    and gives ``y_t = S_tᵀ C_t + D x_t``; the output is ``out_proj(norm(y ⊙ silu(z)))``, normed per group.

    Deviations: in an encoder (the paper is causal only) the convolution is centred and the scan runs both ways with the
    same weights, the two results added and each position's own term counted once; no limits on Δ; in_proj is one
    matrix with one role, dt's rows included.

    State: per head d_state · head_dim numbers in fp32 or wider, the d_conv − 1 last inputs of the convolution, and
    document numbers. Cost: in training that of chunks, linear in the length: see `flops_per_token`.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    role: Role = "scalar"

    def __init__(self, config: Mamba2Config, site: Site):
        super().__init__()
        self.config = config
        self.causal = site.causal
        self.d_state, self.head_dim, self.num_groups = config.d_state, config.head_dim, config.n_groups
        self.chunk_size = config.chunk_size
        self.start = config
        self.inner = config.expand * site.hidden_size
        self.num_heads = self.inner // config.head_dim
        bias, shared = config.projection_bias, config.n_groups * config.d_state
        self.sizes = (self.inner, shared, shared)  # of x, B and C
        width = self.inner + sum(self.sizes) + self.num_heads
        self.in_proj = site.make_linear(site.hidden_size, width, role="mamba", bias=bias)
        self.conv = ShortConv(sum(self.sizes), config.d_conv, bias=config.conv_bias, causal=site.causal)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.num_heads)) for _ in range(3))
        self.norm = GatedNorm(self.inner, config.n_groups, config.norm_eps)
        self.out_proj = site.make_linear(self.inner, site.hidden_size, role="mamba", bias=bias, residual_output=True)

    @torch.no_grad()
    def init_parameters(self, rng: Rng) -> None:
        """Δ log-uniform in [dt_min, dt_max], raised to dt_init_floor; −A uniform in [a_init_min, a_init_max]; D = 1."""
        start = self.start
        ends = math.log(start.dt_min), math.log(start.dt_max)
        step_N = (
            torch.empty(self.num_heads).uniform_(*ends, generator=rng("dt_bias")).exp().clamp_min(start.dt_init_floor)
        )
        self.dt_bias.copy_(step_N + (-torch.expm1(-step_N)).log())  # the inverse of softplus
        rate_N = torch.empty(self.num_heads).uniform_(start.a_init_min, start.a_init_max, generator=rng("A_log"))
        self.A_log.copy_(rate_N.log())
        nn.init.ones_(self.D)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: Mamba2State | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        segments_BT, documents, before = ctx.segment_ids_BT, None, (None, None)
        if state is not None:
            assert self.causal, "an encoder has no state"
            before = state.scan[1:]
            segments_BT = continued_segments(segments_BT, state.scan.segment_B, x_BTD.shape[1])
        if self.causal:
            documents = documents_of(segments_BT, x_BTD.shape[1], *before)
        z_BTI, mixed, dt_BTN = self.in_proj(x_BTD).split((self.inner, sum(self.sizes), self.num_heads), dim=-1)
        mixed, conv = self.conv(mixed, segments_BT, None if state is None else state.conv, kernels=self.kernels)
        y_BTNF, S_BNHF = self._scan(F.silu(mixed), dt_BTN, segments_BT, documents, state)
        out_BTD = self.out_proj(self.norm(y_BTNF.flatten(-2), z_BTI))
        if state is None or conv is None or documents is None or S_BNHF is None:
            return PartOutput(out_BTD)
        return PartOutput(out_BTD, Mamba2State(conv, DecayState(S_BNHF, documents.segment_B, documents.count_B)))

    def _scan(
        self,
        mixed_BTD: Tensor,
        dt_BTN: Tensor,
        segments_BT: Tensor | None,
        documents: Documents | None,
        state: Mamba2State | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads with D's part [B, T, N, F], and the scan's last state (None in an encoder)."""
        x_BTI, B_BTI, C_BTI = mixed_BTD.split(self.sizes, dim=-1)
        x_BTNF = x_BTI.unflatten(-1, (-1, self.head_dim))
        B_BTKH, C_BTKH = (y.unflatten(-1, (self.num_groups, -1)) for y in (B_BTI, C_BTI))
        wide = torch.promote_types(x_BTI.dtype, torch.float32)
        step_BTN = F.softplus(dt_BTN.to(wide) + self.dt_bias.to(wide))
        rate_N = -self.A_log.to(wide).exp()
        skipped_BTNF = self.D.to(x_BTI.dtype)[:, None] * x_BTNF
        if self.kernel is not None and state is None:
            run = outside_graphs(self.kernel.run)
            y_BTNF = run(x_BTNF, step_BTN, rate_N, B_BTKH, C_BTKH, documents, chunk_size=self.chunk_size)
            return y_BTNF + skipped_BTNF, None
        log_decay_BTN = step_BTN * rate_N
        v_BTNF = (x_BTNF * step_BTN[..., None]).to(x_BTI.dtype)
        if self.causal:
            y_BTNF, S_BNHF = decay_attention(
                C_BTKH,
                B_BTKH,
                v_BTNF,
                log_decay_BTN,
                documents=documents,
                state_BNHF=None if state is None else state.scan.S_BNHF,
                chunk_size=self.chunk_size,
                kernels=self.kernels,
            )
        else:
            S_BNHF = None
            y_BTNF = bidirectional_decay_attention(
                C_BTKH,
                B_BTKH,
                v_BTNF,
                log_decay_BTN,
                segment_ids_BT=segments_BT,
                chunk_size=self.chunk_size,
                kernels=self.kernels,
            )
        return y_BTNF + skipped_BTNF, S_BNHF

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zeros, whatever ``max_len``."""
        return Mamba2State(
            self.conv.empty_state(batch_size, device=device, dtype=dtype),
            empty_decay_state(batch_size, self.num_heads, self.d_state, self.head_dim, device=device, dtype=dtype),
        )

    def flops_per_token(self, seq_len: int) -> float:
        """The projections, and the chunked training form (`chunked_flops`), twice in an encoder: exact.

        Masked pairs inside a chunk are multiplied too, so they count; the convolution is no matrix product.
        """
        one_way = chunked_flops(
            seq_len,
            num_groups=self.num_groups,
            num_heads=self.num_heads,
            head_dim=self.d_state,
            value_dim=self.head_dim,
            size=self.chunk_size,
        )
        return linear_flops(self) + one_way * (1 if self.causal else 2)
