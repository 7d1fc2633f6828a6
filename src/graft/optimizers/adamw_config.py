"""Config of AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.optimizers.groups_config import GroupedOptimizerConfig, beta_problems


class AdamWConfig(GroupedOptimizerConfig):
    """AdamW (1711.05101), PyTorch's fused implementation where the device has one."""

    implementation = "graft.optimizers.adamw:build_adamw"
    type: Literal["adamw"] = knob("adamw", "tag")
    betas: tuple[float, float] = knob((0.9, 0.95), "moment decays, each in [0, 1)")
    eps: float = knob(1e-8, "added to the root of the second moment", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        yield from beta_problems(self.betas)
