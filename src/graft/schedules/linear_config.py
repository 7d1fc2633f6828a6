"""Config of the linear schedule."""

from typing import Literal

from graft.config.base import knob
from graft.schedules.base_config import DecayingScheduleConfig


class LinearScheduleConfig(DecayingScheduleConfig):
    """A straight line from the peak to the floor at the last step."""

    implementation = "graft.schedules.linear:LinearSchedule"
    type: Literal["linear"] = knob("linear", "tag")
