"""Config of the cosine schedule."""

from typing import Literal

from graft.config.base import knob
from graft.schedules.base_config import DecayingScheduleConfig


class CosineScheduleConfig(DecayingScheduleConfig):
    """Half a cosine from the peak to the floor, rescaled (never clipped) to end there (1608.03983)."""

    implementation = "graft.schedules.cosine:CosineSchedule"
    type: Literal["cosine"] = knob("cosine", "tag")
