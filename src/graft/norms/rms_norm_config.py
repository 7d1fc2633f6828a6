"""Config of RMSNorm."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import NormConfig


class RMSNormConfig(NormConfig):
    """y = x / sqrt(mean(x²) + eps) · w, computed in fp32 (1910.07467)."""

    implementation = "graft.norms.rms_norm:RMSNorm"
    type: Literal["rms_norm"] = knob("rms_norm", "tag")
    eps: float = knob(1e-6, "added to the mean square", gt=0.0)
    unit_offset: bool = knob(False, "store the weight as an offset: y = x̂·(1 + w) with w = 0 at start (Gemma)")
