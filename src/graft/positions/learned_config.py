"""Config of learned absolute positions."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import PositionConfig


class LearnedPositionConfig(PositionConfig):
    """A learned vector per position, added to the embedding (1706.03762, GPT-2)."""

    implementation = "graft.positions.learned:LearnedPosition"
    acts_in = "embedding"
    type: Literal["learned"] = knob("learned", "tag")
    max_seq_len: int = knob(doc="rows of the table: longest sequence that can be embedded, in tokens", ge=1)
