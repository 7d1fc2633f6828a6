"""Config of no position information."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import PositionConfig


class NoPositionConfig(PositionConfig):
    """No positions (NoPE, 2305.19466): a causal mask alone tells order; an encoder without any is a bag of words."""

    implementation = "graft.positions.none:NoPosition"
    acts_in = "anywhere"
    type: Literal["none"] = knob("none", "tag")
