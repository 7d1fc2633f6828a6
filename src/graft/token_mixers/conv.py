"""The convolution over neighbouring positions as a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.ops.activations import ACTIVATIONS
from graft.ops.short_conv import ConvState
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float
from graft.token_mixers.conv_config import ConvConfig
from graft.token_mixers.short_conv import ShortConv


class Conv(Part):
    """Depthwise convolution over ``kernel_size`` positions, then a map of the channels: the control with local mixing.

    Plain ``W_o act(conv(x))``, a depthwise separable convolution (1610.02357) in one dimension; gated
    ``W_o(act(W_g x) ⊙ conv(x))``, the shape of a gated mlp with the neighbourhood on its linear side (products of a
    position with a convolution are H3's idea, 2212.14052). Deviations: nothing of the papers' networks around it; an
    activation between convolution and map.

    Causal: a position sees itself and the ``kernel_size − 1`` before it. In an encoder the kernel is centred; one of
    even size reaches one position further back than ahead. Never across a document's border.

    State: the last ``kernel_size − 1`` inputs, D numbers and a document number each. Cost: 2·D² (4·D² gated) forward
    FLOPs per position; the convolution is no matrix product.
    """

    def __init__(self, config: ConvConfig, site: Site):
        super().__init__()
        self.config = config
        D = site.hidden_size
        self.conv = ShortConv(D, config.kernel_size, bias=config.conv_bias, causal=site.causal)
        self.gate_proj = site.make_linear(D, D, role="other") if config.gated else None
        self.o_proj = site.make_linear(D, D, role="other", bias=config.output_bias, residual_output=True)
        self.activation = ACTIVATIONS[config.activation] if config.activation else nn.Identity()

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: ConvState | None = None) -> PartOutput:
        y_BTD, state = self.conv(x_BTD, ctx.segment_ids_BT, state, kernels=self.kernels)
        y_BTD = self.activation(y_BTD) if self.gate_proj is None else self.activation(self.gate_proj(x_BTD)) * y_BTD
        return PartOutput(self.o_proj(y_BTD), state)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zeros, whatever ``max_len``."""
        return self.conv.empty_state(batch_size, device=device, dtype=dtype)

    def flops_per_token(self, seq_len: int) -> float:
        return float(linear_flops(self))
