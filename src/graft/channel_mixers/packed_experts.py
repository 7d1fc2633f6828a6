"""Ternary matrices of many experts for inference: two bits per weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.ops.kernels import Kernels
from graft.ops.packed_experts import packed_grouped_linear
from graft.ops.routing import Slots
from graft.ops.ternary import PER_BYTE, pack_codes, ternary
from graft.shapes import Float


class PackedExpertLinear(nn.Module):
    """What a trained ternary `graft.channel_mixers.experts.ExpertLinear` computes, from its codes in bytes and scales.

    Only buffers: nothing here can be trained.

    Args:
        num_experts: matrices (E).
        in_features: channels in.
        out_features: channels out.
        norm: the norm before quantisation, one for all experts, or None.
        bias: there is one per expert.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, norm: nn.Module | None, bias: bool):
        super().__init__()
        self.num_weights = num_experts * in_features * out_features
        self.norm = norm
        num_bytes = -(-in_features // PER_BYTE)
        self.register_buffer("packed", torch.empty(num_experts, out_features, num_bytes, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(num_experts, 1, 1))
        self.register_buffer("bias", torch.empty(num_experts, out_features) if bias else None)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Packs a layer's weight [E, out, in] and takes its bias."""
        codes, self.scale = ternary(weight.detach())
        self.packed = pack_codes(codes)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x_MD: Float[Tensor, "M in"], slots: Slots, kernels: Kernels) -> Float[Tensor, "M out"]:
        x_MD = x_MD if self.norm is None else self.norm(x_MD)
        y_MD = packed_grouped_linear(x_MD, self.packed, self.scale, slots.expert_M, slots.ends_E, kernels=kernels)
        return y_MD if self.bias is None else y_MD + self.bias.index_select(0, slots.expert_M).to(y_MD.dtype)
