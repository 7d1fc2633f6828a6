"""Config of the warm-up, stable, decay schedule."""

from typing import Literal

from graft.config.base import knob
from graft.schedules.base_config import DecayingScheduleConfig


class WsdScheduleConfig(DecayingScheduleConfig):
    """Warm-up, then the peak, then a decay over the last share of the steps after warm-up (2404.06395, 2405.18392)."""

    implementation = "graft.schedules.wsd:WsdSchedule"
    type: Literal["wsd"] = knob("wsd", "tag")
    decay_frac: float = knob(0.2, "share of the steps after warm-up spent decaying; 0 = constant", ge=0.0, le=1.0)
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] = knob("one_minus_sqrt", "shape of the decay")
