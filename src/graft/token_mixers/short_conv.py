"""The short convolution inside recurrent mixers, with its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.kernels import Kernels
from graft.ops.short_conv import ConvState, causal_conv, centred_conv, empty_conv_state
from graft.shapes import Float, Int


class ShortConv(nn.Module):
    """A depthwise convolution over positions: one kernel of K taps per channel (`graft.ops.short_conv`).

    Weights start normal with standard deviation ``(3 K)^(−1/2)``, that of PyTorch's convolutions, or at zero; the bias
    at zero.

    Args:
        channels: channels in and out.
        width: taps (K).
        bias: add a learned bias.
        causal: False = centred.
        dilation: positions from one tap to the next.
        zero_init: start at zero.
    """

    role: Role = "conv"

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool = False,
        causal: bool = True,
        dilation: int = 1,
        zero_init: bool = False,
    ):
        super().__init__()
        self.causal, self.dilation, self.zero_init = causal, dilation, zero_init
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameters(self, rng: Rng) -> None:
        std = 0.0 if self.zero_init else (3 * self.weight.shape[1]) ** -0.5
        normal_(self.weight, std, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> ConvState:
        """The state before the first position."""
        return empty_conv_state(batch_size, *self.weight.shape, dilation=self.dilation, device=device, dtype=dtype)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        segment_ids_BT: Int[Tensor, "B T"] | None = None,
        state: ConvState | None = None,
        *,
        kernels: Kernels = "auto",
    ) -> tuple[Tensor, ConvState | None]:
        """The convolution [B, T, D] and the state after the last position (None without one before)."""
        dilation = self.dilation
        if self.causal:
            return causal_conv(x_BTD, self.weight, self.bias, segment_ids_BT, state, dilation=dilation, kernels=kernels)
        assert state is None, "an encoder has no state"
        return centred_conv(x_BTD, self.weight, self.bias, segment_ids_BT, dilation=dilation, kernels=kernels), None
