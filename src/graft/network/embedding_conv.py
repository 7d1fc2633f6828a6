"""The convolution over embeddings, with its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.ends import EmbeddingConvConfig
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.full_conv import causal_full_conv, centred_full_conv
from graft.ops.kernels import Kernels
from graft.ops.short_conv import ConvState, empty_conv_state
from graft.shapes import Float, Int
from graft.token_mixers.short_conv import ShortConv


class FullConv(nn.Module):
    """A convolution over positions from all channels to all: K matrices, one per tap (`graft.ops.full_conv`).

    Weights start normal with standard deviation ``(3 K R)^(−1/2)``, that of PyTorch's convolutions; the bias at zero.

    Args:
        channels: channels in and out (R).
        width: taps (K).
        bias: add a learned bias.
        causal: False = centred.
    """

    role: Role = "conv"

    def __init__(self, channels: int, width: int, *, bias: bool, causal: bool):
        super().__init__()
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(channels, channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, (3 * self.weight[0].numel()) ** -0.5, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> ConvState:
        """The state before the first position."""
        _, channels, width = self.weight.shape
        return empty_conv_state(batch_size, channels, width, device=device, dtype=dtype)

    def flops_per_token(self) -> int:
        """2 per weight: all taps are multiplied at every position, those outside its document with zeros."""
        return 2 * self.weight.numel()

    def forward(
        self,
        x_BTR: Float[Tensor, "B T R"],
        segment_ids_BT: Int[Tensor, "B T"] | None = None,
        state: ConvState | None = None,
        *,
        kernels: Kernels = "auto",
    ) -> tuple[Tensor, ConvState | None]:
        """The convolution [B, T, R] and the state after the last position (None without one before)."""
        if self.causal:
            return causal_full_conv(x_BTR, self.weight, self.bias, segment_ids_BT, state, kernels=kernels)
        assert state is None, "an encoder has no state"
        return centred_full_conv(x_BTR, self.weight, self.bias, segment_ids_BT, kernels=kernels), None


class DepthwiseConv(ShortConv):
    """One kernel per channel: `graft.token_mixers.short_conv.ShortConv`, in an embedding."""

    def flops_per_token(self) -> int:
        """None: it is no matrix product."""
        return 0


def embedding_conv(config: EmbeddingConvConfig, channels: int, *, causal: bool) -> FullConv | DepthwiseConv:
    """The convolution of a config over ``channels`` channels; ``causal`` False = centred."""
    kind = DepthwiseConv if config.depthwise else FullConv
    return kind(channels, config.kernel_size, bias=config.bias, causal=causal)
