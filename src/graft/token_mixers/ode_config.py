"""Config of a token mixer as a differential equation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from graft.config.base import Problem, knob
from graft.config.families import Part, PartConfig, TokenMixer, TokenMixerConfig

Solver = Literal["euler", "midpoint", "heun", "rk4"]
STAGES: dict[Solver, int] = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Evaluations per step."""


class OdeConfig(TokenMixerConfig):
    """The stream carried by z' = f(z) for a unit of time, f(z) = mixer(norm(z)) or the parts of a whole layer."""

    implementation = "graft.token_mixers.ode:Ode"
    norms_inside: ClassVar[bool] = True
    type: Literal["ode"] = knob("ode", "tag")
    mixer: TokenMixer | None = knob(None, "the token mixer in f; exactly one of mixer and branches")
    branches: tuple[Part, ...] | None = knob(None, "parts that make up f, each with its own norm, run as in a block")
    solver: Solver = knob("rk4", "explicit Runge-Kutta method: 1, 2, 2 or 4 evaluations of f per step (1806.07366)")
    steps: int = knob(1, "equal steps; cost, state and activations grow in proportion", ge=1, le=1000)
    learnable_coefficients: bool = knob(
        False, "learn how much of each stage a step takes, from the solver's on, one number per stage for all steps"
    )
    time_conditioning: bool = knob(
        False, "add (1 − t)·u + t·v to the input of f, u and v learned vectors that start at zero"
    )

    @property
    def parts(self) -> tuple[PartConfig, ...]:
        """The parts that make up f, in order."""
        return (self.mixer,) if self.mixer is not None else self.branches or ()

    @property
    def num_evaluations(self) -> int:
        """How often f is evaluated."""
        return self.steps * STAGES[self.solver]

    @property
    def supports_bidirectional(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - see below
        """As the parts inside do (a constant for every other mixer)."""
        return all(p.supports_bidirectional for p in self.parts if isinstance(p, TokenMixerConfig))

    @property
    def mixes_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - see below
        """As any of the parts inside does (a constant for every other mixer)."""
        return any(p.mixes_tokens for p in self.parts if isinstance(p, TokenMixerConfig))

    def _placed_parts(self) -> Iterator[tuple[tuple[str | int, ...], PartConfig]]:
        for i, part in enumerate(self.parts):
            yield (("mixer",) if self.mixer is not None else ("branches", i)), part

    def problems(self) -> Iterator[Problem]:
        if (self.mixer is None) == (self.branches is None):
            yield Problem(
                ("mixer",), "exactly one of mixer and branches makes up f", "set mixer: {type: …} or branches: [...]"
            )
        elif not self.parts:
            yield Problem(("branches",), "f has no parts", "give it at least one part")
        for path, part in self._placed_parts():
            for name in PartConfig.model_fields:
                if getattr(part, name) != PartConfig.model_fields[name].default:
                    yield Problem(
                        (*path, name), f"{name} of a part inside does nothing: f is in one branch", f"set {name} on ode"
                    )
        if self.time_conditioning and self.num_evaluations == 1:
            yield Problem(("time_conditioning",), "f is evaluated at time 0 alone", "take more steps or another solver")

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        for path, part in self._placed_parts():
            for problem in part.problems_in(hidden_size):
                yield Problem((*path, *problem.path), problem.message, problem.fix)

    def problems_when(self, bidirectional: bool) -> Iterator[Problem]:
        for path, part in self._placed_parts():
            for problem in part.problems_when(bidirectional):
                yield Problem((*path, *problem.path), problem.message, problem.fix)

    def leaks_future(self, bidirectional: bool) -> bool:
        return any(part.leaks_future(bidirectional) for part in self.parts)

    def passes_on(self, hidden_size: int) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for part in self.parts for name, shape in part.passes_on(hidden_size).items()}

    def shares(self) -> Mapping[str, tuple[Any, ...]]:
        return {name: definition for part in self.parts for name, definition in part.shares().items()}
