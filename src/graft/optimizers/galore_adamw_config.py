"""Config of GaLore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.optimizers.groups_config import GroupedOptimizerConfig, beta_problems


class GaloreAdamWConfig(GroupedOptimizerConfig):
    """AdamW whose moments of hidden matrices live in a low-rank subspace of the gradient (2403.03507)."""

    implementation = "graft.optimizers.galore_adamw:build_galore_adamw"
    type: Literal["galore_adamw"] = knob("galore_adamw", "tag")
    rank: int = knob(
        128, "directions kept of each matrix (R); a matrix needs both sides longer (the paper's 60M)", ge=1
    )
    update_proj_gap: int = knob(
        200,
        "updates between two choices of the directions, each a singular value decomposition per matrix (the paper's)",
        ge=1,
    )
    scale: float = knob(0.25, "factor on the update of projected matrices (the paper's choice)", gt=0.0)
    proj_type: Literal["std", "reverse_std", "left", "right"] = knob(
        "std",
        "side whose directions are kept: std the shorter one (least memory), reverse_std the longer one, left rows, "
        "right columns",
    )
    max_dim: int | None = knob(
        None, "matrices with a longer side get plain AdamW, since their decomposition is slow; null = none", ge=1
    )
    betas: tuple[float, float] = knob((0.9, 0.95), "moment decays, each in [0, 1)")
    eps: float = knob(1e-8, "added to the root of the second moment", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        yield from beta_problems(self.betas)
        if self.max_dim is not None and self.max_dim <= self.rank:
            yield Problem(
                ("max_dim",),
                f"no matrix has both sides above rank {self.rank} and none above {self.max_dim}",
                "raise max_dim, or lower rank",
            )
