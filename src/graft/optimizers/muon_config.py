"""Config of Muon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.optimizers.groups_config import GroupedOptimizerConfig, beta_problems


class MuonConfig(GroupedOptimizerConfig):
    """Muon on hidden matrices, AdamW on everything else (kellerjordan.github.io/posts/muon; Moonlight, 2502.16982)."""

    implementation = "graft.optimizers.muon:build_muon"
    type: Literal["muon"] = knob("muon", "tag")
    momentum: float = knob(0.95, "momentum of the gradient average", ge=0.0, lt=1.0)
    nesterov: bool = knob(True, "look ahead by one momentum step")
    ns_steps: int = knob(5, "Newton–Schulz iterations", ge=1, le=20)
    scale: Literal["spectral", "match_rms_adamw"] = knob(
        "match_rms_adamw",
        "match_rms_adamw: update × 0.2·sqrt(max(rows, cols)), so AdamW's rates carry over; "
        "spectral: update × sqrt(max(1, rows/cols))",
    )
    ns_dtype: Literal["float32", "bfloat16"] = knob("bfloat16", "precision of Newton–Schulz; state is fp32 either way")
    adamw_lr_multiplier: float = knob(
        1.0, "AdamW's peak rate as a factor of learning_rate (¼ goes with spectral)", gt=0.0
    )
    betas: tuple[float, float] = knob((0.9, 0.95), "AdamW's moment decays")
    eps: float = knob(1e-8, "AdamW's epsilon", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        yield from beta_problems(self.betas)
