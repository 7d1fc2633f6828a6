"""Config of the real-gated linear recurrence."""

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import TokenMixerConfig


class RGLRUConfig(TokenMixerConfig):
    """Griffin's recurrent block: a convolution and a gated linear recurrence, times a GELU branch (2402.19427)."""

    implementation = "graft.token_mixers.rglru:RGLRU"
    type: Literal["rglru"] = knob("rglru", "tag")
    num_heads: int = knob(doc="blocks of the gates' block-diagonal maps (N), a divisor of the recurrence's width", ge=1)
    intermediate_size: int | None = knob(
        None, "width of the recurrence (F); null = hidden_size; the paper's Griffin has 4/3 of it", ge=1
    )
    kernel_size: int = knob(
        4, "positions the convolution sees, itself included; centred in an encoder (4: the paper's)", ge=1
    )
    conv_bias: bool = knob(True, "bias on the convolution (RecurrentGemma)")
    projection_bias: bool = knob(False, "biases on the three projections (RecurrentGemma has them)")
    activation: Literal["gelu", "gelu_tanh", "silu"] = knob("gelu_tanh", "nonlinearity of the branch beside")
    decay_exponent: float = knob(8.0, "c: a gate that is wide open decays by exp(−c·softplus(Λ))", gt=0.0)
    min_decay: float = knob(0.9, "least decay of a wide open gate at the start (the paper's range)", gt=0.0, lt=1.0)
    max_decay: float = knob(0.999, "largest decay of a wide open gate at the start", gt=0.0, lt=1.0)

    def problems(self) -> Iterator[Problem]:
        if self.min_decay > self.max_decay:
            yield Problem(
                ("min_decay",), f"min_decay {self.min_decay} is above max_decay {self.max_decay}", "swap the two"
            )
        if self.intermediate_size is not None:
            yield from self._head_problems("intermediate_size", self.intermediate_size)

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        if self.intermediate_size is None:
            yield from self._head_problems("hidden_size", hidden_size)

    def _head_problems(self, name: str, width: int) -> Iterator[Problem]:
        if width % self.num_heads:
            yield Problem(
                ("num_heads",),
                f"num_heads {self.num_heads} does not divide {name} {width}",
                "choose a divisor, or set intermediate_size",
            )
