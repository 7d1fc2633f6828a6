"""Config of rotary positions and their length scalings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Config, Problem, knob
from graft.config.families import PositionConfig


class LinearScaling(Config):
    """Position interpolation: positions divided by factor (2306.15595)."""

    type: Literal["linear"] = knob("linear", "tag")
    factor: float = knob(doc="how many times longer than trained", gt=0.0)


class YarnScaling(Config):
    """YaRN (2309.00071): interpolates slow frequencies, keeps fast ones, scales attention by mscale."""

    type: Literal["yarn"] = knob("yarn", "tag")
    factor: float = knob(doc="how many times longer than trained", ge=1.0)
    original_max_seq_len: int = knob(doc="length the unscaled model was trained for, in tokens", ge=1)
    beta_fast: float = knob(32.0, "rotations above which a frequency is kept", gt=0.0)
    beta_slow: float = knob(1.0, "rotations below which a frequency is interpolated", gt=0.0)
    attention_factor: float | None = knob(None, "factor on cos and sin; null = 0.1·ln(factor) + 1", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        if self.beta_fast <= self.beta_slow:
            yield Problem(
                ("beta_fast",),
                f"beta_fast {self.beta_fast} is not above beta_slow {self.beta_slow}",
                "raise beta_fast or lower beta_slow",
            )


class Llama3Scaling(Config):
    """Llama 3.1's frequency-dependent scaling."""

    type: Literal["llama3"] = knob("llama3", "tag")
    factor: float = knob(doc="how many times longer than trained", ge=1.0)
    original_max_seq_len: int = knob(doc="length the unscaled model was trained for, in tokens", ge=1)
    low_freq_factor: float = knob(1.0, "wavelengths above original/low are divided by factor", gt=0.0)
    high_freq_factor: float = knob(4.0, "wavelengths below original/high are kept", gt=0.0)

    def problems(self) -> Iterator[Problem]:
        if self.high_freq_factor <= self.low_freq_factor:
            yield Problem(
                ("high_freq_factor",),
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}",
                "raise high_freq_factor or lower low_freq_factor",
            )


class RopeConfig(PositionConfig):
    """Rotary position embedding (2104.09864): pairs (i, i + r/2) of q and k are turned by position · theta^(−2i/r)."""

    implementation = "graft.positions.rope:Rope"
    type: Literal["rope"] = knob("rope", "tag")
    theta: float = knob(10_000.0, "base of the wavelengths; larger = slower rotations", gt=0.0)
    partial_rotary_factor: float = knob(
        1.0, "share of head_dim that is rotated, from the first channel on", gt=0.0, le=1.0
    )
    scaling: LinearScaling | YarnScaling | Llama3Scaling | None = knob(
        None, "length scaling: {type: linear | yarn | llama3, …}", discriminator="type"
    )

    def rotary_dim(self, head_dim: int) -> int:
        """Channels of a head that are rotated (r)."""
        return int(head_dim * self.partial_rotary_factor)

    def problems_with(self, head_dim: int) -> Iterator[Problem]:
        r = self.rotary_dim(head_dim)
        if r < 2 or r % 2:
            yield Problem(
                ("partial_rotary_factor",),
                f"{r} of head_dim {head_dim} channels would be rotated, which is no even number of at least 2",
                "change head_dim or partial_rotary_factor",
            )
