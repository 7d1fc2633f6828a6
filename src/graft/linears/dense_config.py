"""Config of the plain linear map."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import LinearConfig


class DenseConfig(LinearConfig):
    """y = x Wᵀ + b in the compute dtype."""

    implementation = "graft.linears.dense:Dense"
    operands = "graft.linears.dense:PlainOperands"
    type: Literal["dense"] = knob("dense", "tag")
