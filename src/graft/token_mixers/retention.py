"""Retention as a part."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.decay_attention import bidirectional_decay_attention, chunked_flops, decay_attention
from graft.ops.documents import Documents, documents_of, find_documents
from graft.ops.outside_graphs import outside_graphs
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.positions.base import AttentionPosition, tables_for
from graft.shapes import Float
from graft.token_mixers.decay_state import DecayState, empty_decay_state
from graft.token_mixers.retention_config import RetentionConfig


def log_factors(num_heads: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[N] ``ln γ``, where γ = 1 − exp(linspace(ln 1/32, ln 1/512, N)): the paper's heads (its section 3.1)."""
    ends = math.log(1 / 32), math.log(1 / 512)
    return (-torch.linspace(*ends, num_heads, device=device, dtype=dtype).exp()).log1p()


class Retention(Part):
    """Multi-scale retention (RetNet, arXiv 2307.08621, equations 5 to 8): linear attention with a fading past.

    Per head ``R_nm = q_n·k_m / √H · γ^(n − m)`` for m <= n, q and k rotated; each head's ``Σ_m R_nm v_m`` is normed,
    then ``o_proj(silu(gate_proj x) ⊙ heads)``. With ``score_norm`` the factors of a row are divided by √(their sum),
    then the row by max(|its sum|, 1). In an encoder γ^|n − m| on both sides.

    Deviations: the head norm has no weights and is an RMS norm unless asked (as the authors' own code; the paper writes
    group norm); gradients pass through the row sums (that code stops them); the rotation is that of ``position``, whose
    angles differ a little from that code's (the paper fixes none). Rotation and fading together are what the paper
    calls xPos; the per-channel factors of 2212.10554 have no place beside γ. The head norm takes out any factor of a
    row, so that ``score_norm`` moves the output by the norm's eps alone.

    State: H·(V + 1) numbers per head in fp32 or wider (V = value_factor·H; the one more is the running sum of keys, for
    ``score_norm``), and two integers. Cost: in training that of chunks, linear in the length: see `flops_per_token`.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    def __init__(self, config: RetentionConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal = site.causal
        self.num_heads = config.num_heads
        self.score_norm, self.chunk_size = config.score_norm, config.chunk_size
        self.head_norm, self.head_norm_eps = config.head_norm, config.head_norm_eps
        D, N = site.hidden_size, config.num_heads
        self.head_dim = config.head_dim or D // N
        self.value_dim = config.value_factor * self.head_dim
        self.q_proj = site.make_linear(D, N * self.head_dim, role="retention")
        self.k_proj = site.make_linear(D, N * self.head_dim, role="retention")
        self.v_proj = site.make_linear(D, N * self.value_dim, role="retention")
        self.gate_proj = site.make_linear(D, N * self.value_dim, role="retention")
        self.o_proj = site.make_linear(N * self.value_dim, D, role="retention", residual_output=True)
        self.position: AttentionPosition = config.position.build(N, self.head_dim)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: DecayState | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        y_BTNF, state = self.retain(x_BTD, ctx, state)
        y_BTNF = self._head_norm(y_BTNF).to(x_BTD.dtype)
        return PartOutput(self.o_proj(F.silu(self.gate_proj(x_BTD)) * y_BTNF.flatten(-2)), state)

    def retain(self, x_BTD: Tensor, ctx: Context, state: DecayState | None) -> tuple[Tensor, DecayState | None]:
        """The heads before their norm [B, T, N, F] in fp32 or wider, and the state after the last position."""
        q_BTNH, k_BTNH, v_BTNF = self._project(x_BTD, ctx)
        wide = torch.promote_types(v_BTNF.dtype, torch.float32)
        log_N = log_factors(self.num_heads, device=x_BTD.device, dtype=wide)
        if self.score_norm:
            v_BTNF = F.pad(v_BTNF, (0, 1), value=1.0)  # a channel of ones adds up the scores
        if not ctx.causal:
            assert state is None, "an encoder has no state"
            y_BTNF = bidirectional_decay_attention(
                q_BTNH,
                k_BTNH,
                v_BTNF,
                log_N[None, None],
                segment_ids_BT=ctx.segment_ids_BT,
                chunk_size=self.chunk_size,
                kernels=self.kernels,
            )
            return self._score_norm(y_BTNF.to(wide), _both_row_sums(ctx.segment_ids_BT, x_BTD.shape[1], log_N)), None
        before = (None, None) if state is None else state[1:]
        documents = documents_of(ctx.segment_ids_BT, x_BTD.shape[1], *before)
        if self.kernel is not None and state is None:
            y_BTNF = outside_graphs(self.kernel.run)(q_BTNH, k_BTNH, v_BTNF, log_N[None, None], documents)
            return self._score_norm(y_BTNF.to(wide), _row_sums(documents, x_BTD.shape[1], log_N)), None
        y_BTNF, S_BNHF = decay_attention(
            q_BTNH,
            k_BTNH,
            v_BTNF,
            log_N[None, None],
            documents=documents,
            state_BNHF=None if state is None else state.S_BNHF,
            chunk_size=self.chunk_size,
            kernels=self.kernels,
        )
        y_BTNF = self._score_norm(y_BTNF.to(wide), _row_sums(documents, x_BTD.shape[1], log_N))
        if state is None or documents is None:
            return y_BTNF, None
        return y_BTNF, DecayState(S_BNHF, documents.segment_B, documents.count_B)

    def _project(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated and scaled keys, and values."""
        q_BTNH, k_BTNH = (y(x_BTD).unflatten(-1, (-1, self.head_dim)) for y in (self.q_proj, self.k_proj))
        v_BTNF = self.v_proj(x_BTD).unflatten(-1, (-1, self.value_dim))
        tables = tables_for(self.position, ctx.tables, ctx.positions_BT)
        k_BTNH = self.position.encode(k_BTNH * self.head_dim**-0.5, tables)
        return self.position.encode(q_BTNH, tables), k_BTNH, v_BTNF

    def _score_norm(self, y_BTNF: Tensor, row_sums_BTN: Tensor) -> Tensor:
        """Divides by √(row sums of the factors), then by the scores' own row sum where that is above 1."""
        if not self.score_norm:
            return y_BTNF
        y_BTNF = y_BTNF / row_sums_BTN.sqrt()[..., None]
        return y_BTNF[..., :-1] / y_BTNF[..., -1:].abs().clamp_min(1.0)

    def _head_norm(self, y_BTNF: Tensor) -> Tensor:
        shape, eps = (self.value_dim,), self.head_norm_eps
        if self.head_norm == "layer_norm":
            return F.layer_norm(y_BTNF, shape, eps=eps)
        return F.rms_norm(y_BTNF, shape, eps=eps)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zeros, whatever ``max_len``."""
        width = self.value_dim + int(self.score_norm)
        return empty_decay_state(batch_size, self.num_heads, self.head_dim, width, device=device, dtype=dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """The projections, and the chunked training form (`chunked_flops`), twice in an encoder: exact.

        Masked pairs inside a chunk are multiplied too, so they count.
        """
        N = self.num_heads
        one_way = chunked_flops(
            seq_len,
            num_groups=N,
            num_heads=N,
            head_dim=self.head_dim,
            value_dim=self.value_dim + int(self.score_norm),
            size=self.chunk_size,
        )
        return linear_flops(self) + one_way * (1 if self.causal else 2)


def _row_sums(documents: Documents | None, num_positions: int, log_N: Tensor) -> Tensor:
    """``Σ_i γ^i`` over a position and those before it in its document: [B, T, N], B = 1 without documents."""
    index_BT = torch.arange(num_positions, device=log_N.device)[None] if documents is None else documents.index_BT
    return ((index_BT[..., None] + 1) * log_N).expm1() / log_N.expm1()


def _both_row_sums(segment_ids_BT: Tensor | None, num_positions: int, log_N: Tensor) -> Tensor:
    """``Σ_m γ^|n − m|`` over the document of each position n."""
    back = ahead = None
    if segment_ids_BT is not None:
        back, ahead = find_documents(segment_ids_BT), find_documents(segment_ids_BT.flip(1))
    before, after = (_row_sums(found, num_positions, log_N) for found in (back, ahead))
    return before + after.flip(1) - 1.0
