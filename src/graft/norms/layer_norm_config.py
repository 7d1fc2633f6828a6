"""Config of LayerNorm."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import NormConfig


class LayerNormConfig(NormConfig):
    """y = (x − mean) / sqrt(var + eps) · w + b, computed in fp32 (1607.06450)."""

    implementation = "graft.norms.layer_norm:LayerNorm"
    type: Literal["layer_norm"] = knob("layer_norm", "tag")
    eps: float = knob(1e-5, "added to the variance", gt=0.0)
    bias: bool = knob(True, "learned shift b")
