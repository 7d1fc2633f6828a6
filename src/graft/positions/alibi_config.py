"""Config of ALiBi."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import PositionConfig


class AlibiConfig(PositionConfig):
    """Scores lose slope · distance, with a geometric series of slopes over heads (2108.12409)."""

    implementation = "graft.positions.alibi:Alibi"
    type: Literal["alibi"] = knob("alibi", "tag")
