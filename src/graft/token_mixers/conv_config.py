"""Config of the convolution over neighbouring positions."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import TokenMixerConfig


class ConvConfig(TokenMixerConfig):
    """W_o(act(conv(x))), or gated W_o(act(W_g x) ⊙ conv(x)): the control that mixes a fixed, small neighbourhood."""

    implementation = "graft.token_mixers.conv:Conv"
    type: Literal["conv"] = knob("conv", "tag")
    kernel_size: int = knob(
        4, "positions a position sees, itself included (taps); from 3, so that an encoder reaches both sides", ge=3
    )
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | None = knob(
        "silu", "nonlinearity after the convolution, or on the gate; null = none"
    )
    gated: bool = knob(False, "multiply the convolution by a gate made of the position itself (H3, 2212.14052)")
    conv_bias: bool = knob(False, "bias on the convolution")
    output_bias: bool = knob(False, "bias on the output projection")
