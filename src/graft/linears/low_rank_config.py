"""Config of the low-rank linear map."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import LinearConfig


class LowRankConfig(LinearConfig):
    """y = U (D x): a matrix as the product of a wide and a tall one."""

    implementation = "graft.linears.low_rank:LowRank"
    type: Literal["low_rank"] = knob("low_rank", "tag")
    rank: int = knob(
        doc="channels in between (R); saves parameters and FLOPs below in · out / (in + out) of the map", ge=1
    )
