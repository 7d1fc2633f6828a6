"""Config of Dynamic Tanh."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import NormConfig


class DyTConfig(NormConfig):
    """y = γ·tanh(αx) + β, no statistics (2503.10622)."""

    implementation = "graft.norms.dyt:DyT"
    type: Literal["dyt"] = knob("dyt", "tag")
    alpha_init: float = knob(
        0.5, "start of the scalar α; wide LLMs want more in attention (0.8) than elsewhere (0.2)", gt=0.0
    )
