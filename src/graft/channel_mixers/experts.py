"""Many feed-forward networks of one shape, of which each position goes through a few."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from graft.channel_mixers.moe_config import MoeConfig
from graft.channel_mixers.packed_experts import PackedExpertLinear
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.linears.bitlinear import TernaryOperands
from graft.ops.activations import ACTIVATIONS
from graft.ops.grouped_linear import grouped_linear
from graft.ops.kernels import Kernels
from graft.ops.routing import Slots, collect, sort_slots, spread
from graft.part import Site
from graft.shapes import Float, Int


class ExpertLinear(nn.Module):
    """``y = W_e x + b_e``, a matrix per expert, over rows sorted by expert. W starts normal, b at zero.

    The only place where experts' matrices are used: what is to be done to all of them is done here. The model's kind
    of linear map for experts says what the rows and each matrix become before they are multiplied; a norm among that
    is one for all experts.

    Args:
        site: where they stand.
        num_experts: matrices (E).
        in_features: channels in.
        out_features: channels out.
        bias: add b.
        init_std: standard deviation of W at start.
    """

    role: Role = "expert"

    def __init__(
        self, site: Site, num_experts: int, in_features: int, out_features: int, *, bias: bool, init_std: float
    ):
        super().__init__()
        self.config, self.init_std = site.linear_of("expert"), init_std
        self.operands = site.make_operands(in_features, role="expert")
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_MD: Float[Tensor, "M in"], slots: Slots, kernels: Kernels) -> Float[Tensor, "M out"]:
        x_MD, weight = self.operands(x_MD, self.weight)
        y_MD = grouped_linear(x_MD, weight, slots.ends_E, kernels=kernels)
        if self.bias is None:
            return y_MD
        return y_MD + self.bias.index_select(0, slots.expert_M).to(y_MD.dtype)

    @property
    def num_weights(self) -> int:
        """Entries of all matrices."""
        return self.weight.numel()

    def packed(self) -> PackedExpertLinear:
        """Ternary experts for inference, two bits per weight (empty ones on the meta device)."""
        assert isinstance(self.operands, TernaryOperands), "only ternary matrices are packed"
        experts, out_features, in_features = self.weight.shape
        norm, bias = self.operands.norm, self.bias is not None
        layer = PackedExpertLinear(experts, in_features, out_features, norm=norm, bias=bias).to(self.weight.device)
        if not self.weight.is_meta:
            layer.fill(self.weight, self.bias)
        return layer


class Experts(nn.Module):
    """Σ over a position's experts of weight · network(x), each network as in `graft.channel_mixers.mlp`.

    Args:
        config: sizes and kind of the networks.
        site: where they stand.
    """

    def __init__(self, config: MoeConfig, site: Site):
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = site.hidden_size, config.intermediate_size

        def make(in_features: int, out_features: int, *, residual_output: bool = False) -> ExpertLinear:
            std = site.weight_std(residual_output=residual_output)
            return ExpertLinear(site, config.num_experts, in_features, out_features, bias=config.bias, init_std=std)

        self.gate_proj = make(width, inner) if config.gated else None
        self.up_proj = make(width, inner)
        self.down_proj = make(inner, width, residual_output=True)
        self.activation = ACTIVATIONS[config.activation]

    def linears(self) -> Iterator[ExpertLinear | PackedExpertLinear]:
        """The maps each expert has of its own, packed or not."""
        return (linear for linear in (self.gate_proj, self.up_proj, self.down_proj) if linear is not None)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        experts: Int[Tensor, "B T choices"],
        weights: Float[Tensor, "B T choices"],
        kernels: Kernels,
    ) -> Float[Tensor, "B T D"]:
        """What the chosen experts say.

        Args:
            x_BTD: positions.
            experts: the chosen ones of each.
            weights: how much each counts.
            kernels: "reference" multiplies expert by expert.
        """
        slots = sort_slots(experts.flatten(0, 1), self.num_experts)
        x_MD = spread(x_BTD.flatten(0, 1), slots)
        inner_MF = self.up_proj(x_MD, slots, kernels)
        if self.gate_proj is None:
            inner_MF = self.activation(inner_MF)
        else:
            inner_MF = self.activation(self.gate_proj(x_MD, slots, kernels)) * inner_MF
        y_MD = self.down_proj(inner_MF, slots, kernels)
        return collect(y_MD, weights.flatten(0, 1), slots).to(y_MD.dtype).view(x_BTD.shape)
