"""A ternary linear map for inference: two bits per weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.ops.kernels import Kernels
from graft.ops.ternary import PER_BYTE, pack_codes, packed_linear, packed_linear_reference, ternary


class PackedTernary(nn.Module):
    """What a trained `graft.linears.bitlinear.BitLinear` computes, from its codes in bytes and its scale.

    Weights are multiplied with the 8-bit activations as whole numbers, a two-bit place of all bytes at a time; nothing
    larger is ever made of them. Only buffers: nothing here can be trained.

    Args:
        in_features: channels in.
        out_features: channels out.
        norm: the norm before quantisation, or None.
        bias: there is one.
        kernels: "reference" multiplies unpacked floats, bit for bit as the layer that was packed.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: nn.Module | None,
        bias: bool,
        kernels: Kernels = "auto",
    ):
        super().__init__()
        self.in_features, self.out_features, self.kernels = in_features, out_features, kernels
        self.norm = norm
        self.register_buffer("packed", torch.empty(out_features, -(-in_features // PER_BYTE), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(1, 1))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Packs a layer's weight [out, in] and takes its bias."""
        codes, self.scale = ternary(weight.detach())
        self.packed = pack_codes(codes)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        x = x if self.norm is None else self.norm(x)
        form = packed_linear_reference if self.kernels == "reference" else packed_linear
        return form(x, self.packed, self.scale, self.bias)
