"""Config of the control that mixes nothing."""

from typing import ClassVar, Literal

from graft.config.base import knob
from graft.config.families import TokenMixerConfig


class IdentityConfig(TokenMixerConfig):
    """y = x: the control of an ablation over token mixers (IdentityFormer, 2210.13452)."""

    implementation = "graft.token_mixers.identity:Identity"
    mixes_tokens: ClassVar[bool] = False
    type: Literal["identity"] = knob("identity", "tag")
