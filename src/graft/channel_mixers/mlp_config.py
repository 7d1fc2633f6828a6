"""Config of the feed-forward network."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import ChannelMixerConfig


class MlpConfig(ChannelMixerConfig):
    """gated: W_down(act(W_gate x) ⊙ W_up x) (2002.05202); plain: W_down act(W_up x)."""

    implementation = "graft.channel_mixers.mlp:Mlp"
    type: Literal["mlp"] = knob("mlp", "tag")
    intermediate_size: int = knob(doc="inner width (F)", ge=1)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = knob(
        "silu", "nonlinearity; relu2 = relu² (2109.08668)"
    )
    gated: bool = knob(True, "three matrices with a gate, or two without")
    bias: bool = knob(False, "biases on all matrices")
    dropout: float = knob(0.0, "dropout rate on the inner activations, in [0, 1)", ge=0.0, lt=1.0)
