"""Config of Derf."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import NormConfig


class DerfConfig(NormConfig):
    """y = γ·erf(αx + s) + β, no statistics (2512.10938)."""

    implementation = "graft.norms.derf:Derf"
    type: Literal["derf"] = knob("derf", "tag")
    alpha_init: float = knob(0.5, "start of the scalar α (the paper's)", gt=0.0)
    shift_init: float = knob(0.0, "start of the scalar s (the paper's)")
