"""Config of the ternary linear map."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import LinearConfig, Norm
from graft.norms.rms_norm_config import RMSNormConfig


class BitLinearConfig(LinearConfig):
    """BitNet b1.58: weights −1, 0, 1 times one scale per matrix, 8-bit activations (2402.17764)."""

    implementation = "graft.linears.bitlinear:BitLinear"
    operands = "graft.linears.bitlinear:TernaryOperands"
    type: Literal["bitlinear"] = knob("bitlinear", "tag")
    norm: Norm | None = knob(
        doc="norm over the channels before they are quantised; null = none; RMSNorm as published",
        factory=RMSNormConfig,
    )
    warmup_steps: int = knob(
        0,
        "updates over which quantisation comes in, its share growing from 0 to 1; 0 = quantised from the start, "
        "as published",
        ge=0,
    )
