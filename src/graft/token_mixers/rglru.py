"""The real-gated linear recurrence as a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.activations import ACTIVATIONS
from graft.ops.bidirectional import bidirectional_sum
from graft.ops.documents import Documents, begins, documents_of, find_documents, nothing_yet
from graft.ops.linear_scan import linear_scan
from graft.ops.short_conv import ConvState
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float
from graft.token_mixers.rglru_config import RGLRUConfig
from graft.token_mixers.short_conv import ShortConv

LEAST_SQUARE = 1e-30
"""Least value under the root: at 0, where a gate has closed to the last bit, the slope would be infinite."""


class RGLRUState(NamedTuple):
    """What the recurrence carries.

    Args:
        h_BF: the recurrence's channels, fp32 or wider.
        conv: the inputs the convolution still sees.
        segment_B: number of the document under way; 0 = none yet.
    """

    h_BF: Tensor
    conv: ConvState
    segment_B: Tensor


class BlockDiagonal(nn.Module):
    """A map whose matrix is zero outside ``num_heads`` equal square blocks on the diagonal, with a bias."""

    role: Role = "recurrence"

    def __init__(self, width: int, num_heads: int, init_std: float):
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_heads, width // num_heads, width // num_heads))
        self.bias = nn.Parameter(torch.empty(width))

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """[…, width] to the same shape."""
        heads = x.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...nh,nhp->...np", heads, self.weight).flatten(-2) + self.bias


class GatedRecurrence(nn.Module):
    """The recurrence alone (RG-LRU): ``h_t = a_t ⊙ h_{t-1} + sqrt(1 − a_t²) ⊙ i_t ⊙ u_t``.

    ``a = exp(−c·softplus(Λ)·r)`` with the gates ``r, i = σ(block-diagonal(u))``. Λ starts so that ``a`` at r = 1 is
    uniform between min_decay and max_decay, channel by channel.
    """

    param_roles: Mapping[str, Role] = {"decay_parameter": "scalar"}

    def __init__(self, config: RGLRUConfig, width: int, init_std: float):
        super().__init__()
        self.config = config
        self.decay_parameter = nn.Parameter(torch.empty(width))
        self.input_gate = BlockDiagonal(width, config.num_heads, init_std)
        self.recurrence_gate = BlockDiagonal(width, config.num_heads, init_std)

    @torch.no_grad()
    def init_parameters(self, rng: Rng) -> None:
        if self.decay_parameter.device.type == "meta":
            return
        low, high = self.config.min_decay, self.config.max_decay
        drawn = torch.empty(self.decay_parameter.shape).uniform_(low, high, generator=rng("decay_parameter"))
        softplus = -drawn.double().log() / self.config.decay_exponent
        self.decay_parameter.copy_(softplus.expm1().log())

    def forward(self, u_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of ``a``, and the gated inputs ``i ⊙ u``: [B, T, F] each, fp32 or wider."""
        wide = torch.promote_types(u_BTF.dtype, torch.float32)
        gate_BTF = torch.sigmoid(self.recurrence_gate(u_BTF).to(wide))
        rate_F = -self.config.decay_exponent * F.softplus(self.decay_parameter.to(wide))
        return rate_F * gate_BTF, torch.sigmoid(self.input_gate(u_BTF).to(wide)) * u_BTF.to(wide)


def steps(log_decay_BTF: Tensor, gated_BTF: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """The decays and what is added. Where a document begins the decay is 0 and the root 1; padding is passed over."""
    if documents is None:
        first_BT1 = (torch.arange(gated_BTF.shape[1], device=gated_BTF.device) == 0)[None, :, None]
        return log_decay_BTF.exp(), _entering(log_decay_BTF, gated_BTF, first_BT1)
    first_BT1, pad_BT1 = begins(documents)[..., None], ~documents.real_BT[..., None]
    decay_BTF = log_decay_BTF.exp().masked_fill(first_BT1, 0.0).masked_fill(pad_BT1, 1.0)
    return decay_BTF, _entering(log_decay_BTF, gated_BTF, first_BT1).masked_fill(pad_BT1, 0.0)


def _entering(log_decay_BTF: Tensor, gated_BTF: Tensor, whole_BT1: Tensor) -> Tensor:
    """The gated inputs times the root, or as they are where ``whole``."""
    root_BTF = (-torch.expm1(2.0 * log_decay_BTF)).clamp_min(LEAST_SQUARE).sqrt()
    return torch.where(whole_BT1, gated_BTF, root_BTF * gated_BTF)


def own_inputs(log_decay_BTF: Tensor, gated_BTF: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
    """What a position gives to itself in both directions, to be taken off their sum once: [B, T, F].

    That is its input with the root, or whole where it is a document by itself. At either end of a document it enters
    whole in one direction, and stays so.
    """
    if segment_ids_BT is None:
        alone_BT1 = torch.full((1, 1, 1), gated_BTF.shape[1] == 1, device=gated_BTF.device)
    else:
        first_BT, last_BT = (begins(find_documents(numbers)) for numbers in (segment_ids_BT, segment_ids_BT.flip(1)))
        alone_BT1 = (first_BT & last_BT.flip(1))[..., None]
    return _entering(log_decay_BTF, gated_BTF, alone_BT1)


class RGLRU(Part):
    """Griffin's recurrent block: ``W_o(gelu(W_g x) ⊙ RG-LRU(conv(W_x x)))``.

    Source: Griffin (2402.19427, section 2.4 and appendix A), which with an mlp beside it makes Hawk; the recurrence is
    `GatedRecurrence`. At the first position of a document nothing is remembered and the input enters without the root
    (RecurrentGemma's convention). Deviations: projections without bias unless asked; the gates' matrices start as all
    others (the paper: LeCun); the root of a closed gate is bounded (`LEAST_SQUARE`), not its slope. In an encoder (the
    paper is causal only) the convolution is centred and the recurrence runs both ways with the same weights, the two
    ``h`` added and each position's own input counted once (`own_inputs`).

    Decays and sums are fp32 or wider. The fast form is a scan in chunks (`graft.ops.linear_scan`), which multiplies and
    adds alone, the reference is the recurrence.

    State: F fp32 numbers, ``kernel_size − 1`` inputs of F channels with a document number each, and one more document
    number; whatever the length. FLOPs: 6·D·F for the projections and 4·F²/N for the gates; the recurrence and the
    convolution are no matrix products, in training and decoding alike.
    """

    def __init__(self, config: RGLRUConfig, site: Site):
        super().__init__()
        self.config = config
        self.causal = site.causal
        D = site.hidden_size
        self.width = config.intermediate_size or D
        bias = config.projection_bias
        self.gate_proj = site.make_linear(D, self.width, role="recurrence", bias=bias)
        self.x_proj = site.make_linear(D, self.width, role="recurrence", bias=bias)
        self.conv = ShortConv(self.width, config.kernel_size, bias=config.conv_bias, causal=site.causal)
        self.recurrence = GatedRecurrence(config, self.width, site.init.std)
        self.o_proj = site.make_linear(self.width, D, role="recurrence", bias=bias, residual_output=True)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: RGLRUState | None = None) -> PartOutput:
        """[B, T, D] to [B, T, D]; see `graft.part.Part`. Decoding is causal only."""
        conv_state = None if state is None else state.conv
        u_BTF, conv_state = self.conv(self.x_proj(x_BTD), ctx.segment_ids_BT, conv_state, kernels=self.kernels)
        log_decay_BTF, gated_BTF = self.recurrence(u_BTF)
        if not self.causal:
            assert state is None, "an encoder has no state"
            h_BTF = bidirectional_sum(self._one_way, (log_decay_BTF, gated_BTF), ctx.segment_ids_BT)
            h_BTF = h_BTF - own_inputs(log_decay_BTF, gated_BTF, ctx.segment_ids_BT)
            return PartOutput(self._out(x_BTD, h_BTF))
        documents = documents_of(ctx.segment_ids_BT, x_BTD.shape[1], None if state is None else state.segment_B)
        h_BTF = self._one_way(log_decay_BTF, gated_BTF, documents, state)
        if state is not None:
            assert documents is not None
            assert conv_state is not None
            state = RGLRUState(h_BTF[:, -1].to(state.h_BF.dtype), conv_state, documents.segment_B)
        return PartOutput(self._out(x_BTD, h_BTF), state)

    def _one_way(
        self,
        log_decay_BTF: Tensor,
        gated_BTF: Tensor,
        documents: Documents | None,
        state: RGLRUState | None = None,
    ) -> Tensor:
        """The recurrence from the first position to the last."""
        before_BF = None if state is None else state.h_BF.to(gated_BTF.dtype)
        return linear_scan(*steps(log_decay_BTF, gated_BTF, documents), before_BF, kernels=self.kernels)

    def _out(self, x_BTD: Tensor, h_BTF: Tensor) -> Tensor:
        """The recurrence beside its branch, projected."""
        branch_BTF = self.activation(self.gate_proj(x_BTD))
        return self.o_proj(branch_BTF * h_BTF.to(branch_BTF.dtype))

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zeros, whatever ``max_len``."""
        wide = torch.promote_types(dtype, torch.float32)
        h_BF = torch.zeros(batch_size, self.width, device=device, dtype=wide)
        conv = self.conv.empty_state(batch_size, device=device, dtype=dtype)
        return RGLRUState(h_BF, conv, nothing_yet(batch_size, device))

    def flops_per_token(self, seq_len: int) -> float:
        """2 per weight of the projections and of the gates' blocks: exact, in training and decoding alike."""
        gates = (self.recurrence.input_gate, self.recurrence.recurrence_gate)
        return float(linear_flops(self) + sum(2 * gate.weight.numel() for gate in gates))
