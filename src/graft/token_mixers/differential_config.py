"""Config of differential attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.token_mixers.heads_config import HeadsConfig


class DifferentialConfig(HeadsConfig):
    """Differential attention: half of the heads attend, the other half say what to take away again."""

    implementation = "graft.token_mixers.differential:Differential"
    type: Literal["differential"] = knob("differential", "tag")
    lambda_std: float = knob(0.1, "standard deviation of the four vectors behind λ at start, as published", gt=0.0)
    head_norm_eps: float = knob(1e-5, "added to the mean square in the RMSNorm of each pair of heads", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for name in ("num_heads", "num_kv_heads"):
            number = getattr(self, name)
            if number is not None and number % 2:
                yield Problem((name,), f"{number} heads cannot be paired", "make it even")
