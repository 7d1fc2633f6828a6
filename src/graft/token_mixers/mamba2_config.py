"""Config of Mamba-2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import TokenMixerConfig


class Mamba2Config(TokenMixerConfig):
    """Mamba-2's state space mixer (SSD, 2405.21060): a state per head that fades as the token says."""

    implementation = "graft.token_mixers.mamba2:Mamba2"
    type: Literal["mamba2"] = knob("mamba2", "tag")
    d_state: int = knob(128, "channels of B and C: rows of a head's state", ge=1)
    d_conv: int = knob(4, "positions the convolution before the scan sees, itself included (taps)", ge=1)
    expand: int = knob(2, "inner width over hidden_size", ge=1)
    head_dim: int = knob(64, "channels of a head (headdim), a divisor of expand · hidden_size", ge=1)
    n_groups: int = knob(1, "groups of heads that share B and C and are normed together, a divisor of the heads", ge=1)
    chunk_size: int = knob(64, "positions per chunk of the training form: changes the cost, not the numbers", ge=1)
    dt_min: float = knob(0.001, "smallest step size at the start", gt=0.0)
    dt_max: float = knob(0.1, "largest step size at the start; log-uniform between the two", gt=0.0)
    dt_init_floor: float = knob(1e-4, "step sizes below are raised to this at the start", gt=0.0)
    a_init_min: float = knob(1.0, "smallest rate of fading −A at the start", gt=0.0)
    a_init_max: float = knob(16.0, "largest rate of fading −A at the start; uniform between the two", gt=0.0)
    conv_bias: bool = knob(True, "bias on the convolution")
    projection_bias: bool = knob(False, "biases on the input and output projections")
    norm_eps: float = knob(1e-5, "added to the mean square in the gated norm", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        for low, high in (("dt_min", "dt_max"), ("a_init_min", "a_init_max")):
            if getattr(self, low) > getattr(self, high):
                yield Problem(
                    (low,), f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}", f"lower {low}"
                )
        if self.dt_init_floor > self.dt_max:
            yield Problem(
                ("dt_init_floor",),
                f"dt_init_floor {self.dt_init_floor} is above dt_max {self.dt_max}: all step sizes would be the floor",
                "lower dt_init_floor",
            )

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        inner = self.expand * hidden_size
        if inner % self.head_dim:
            yield Problem(
                ("head_dim",),
                f"head_dim {self.head_dim} does not divide expand · hidden_size = {inner}",
                "choose a divisor",
            )
        elif (inner // self.head_dim) % self.n_groups:
            yield Problem(
                ("n_groups",),
                f"n_groups {self.n_groups} does not divide the {inner // self.head_dim} heads",
                "choose a divisor, or another head_dim",
            )
