"""Config of the constant schedule."""

from typing import Literal

from graft.config.base import knob
from graft.schedules.base_config import WarmupScheduleConfig


class ConstantScheduleConfig(WarmupScheduleConfig):
    """The peak after warm-up."""

    implementation = "graft.schedules.constant:ConstantSchedule"
    type: Literal["constant"] = knob("constant", "tag")
