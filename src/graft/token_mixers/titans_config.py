"""Config of Titans: attention beside a memory that learns while it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import Norm, Position, TokenMixerConfig
from graft.token_mixers.head_problems import embedding_position_problems, head_problems

WITH_MEMORY = {"neural_memory": True}


class TitansConfig(TokenMixerConfig):
    """Titans (2501.00663): attention over a short reach, and a neural memory trained at test time for the rest."""

    implementation = "graft.token_mixers.titans:build_titans"
    type: Literal["titans"] = knob("titans", "tag")
    form: Literal["mac", "mag", "mal"] = knob(
        "mac",
        "memory as context of segment-wise attention, as gate of sliding attention, or as a layer before it",
        only_if=WITH_MEMORY,
    )
    neural_memory: bool = knob(True, "false: attention alone")
    num_heads: int = knob(doc="heads of the attention and of the memory (N)", ge=1)
    head_dim: int | None = knob(None, "channels per head (H); null = hidden_size / num_heads", ge=1)
    sliding_window: int | None = knob(
        None,
        "keys a query sees, itself included, in an encoder on either side: required by mag and mal, none in mac (its "
        "reach is chunk_size)",
        ge=1,
    )
    position: Position = knob(doc="how positions enter the attention")
    qk_norm: Norm | None = knob(None, "norm on the attention's q and k per head, before positions; null = none")
    num_persistent_tokens: int = knob(
        4, "learned keys and values every query sees, 0 or more; no positions", ge=0, only_if=WITH_MEMORY
    )
    chunk_size: int = knob(
        64,
        "tokens whose surprise is measured against the same memory (C), counted from the document's first (read from "
        "the right: its last); in mac also the attention's segment",
        ge=1,
        only_if=WITH_MEMORY,
    )
    memory_depth: int = knob(
        2,
        "layers of a head's memory, 1 = a matrix; 2 because the paper finds deep memories better",
        ge=1,
        only_if=WITH_MEMORY,
    )
    memory_intermediate_size: int | None = knob(
        None, "channels between the layers of a memory of depth 2 or more; null = head_dim", ge=1, only_if=WITH_MEMORY
    )
    max_memory_step: float = knob(
        0.1,
        "upper bound of the step θ along the surprise, above 0; small, because the steps of a chunk add up",
        gt=0.0,
        le=1.0,
        only_if=WITH_MEMORY,
    )
    max_surprise: float | None = knob(
        1.0,
        "greatest length of a token's gradient, per head; longer ones are shortened to it, or else the steps of a "
        "chunk overshoot where tokens repeat, and the memory leaves the range of numbers; null = any (the paper)",
        gt=0.0,
        only_if=WITH_MEMORY,
    )
    conv_size: int | None = knob(
        None,
        "taps of convolutions on the memory's q, k and v (the paper's option), centred in an encoder; null = none",
        ge=2,
        only_if=WITH_MEMORY,
    )

    def problems(self) -> Iterator[Problem]:
        yield from embedding_position_problems(self.position)
        if not self.neural_memory:
            return
        yield from self._reach_problems()
        if self.memory_depth == 1 and self.memory_intermediate_size is not None:
            yield Problem(
                ("memory_intermediate_size",),
                "a memory of depth 1 has nothing between its layers",
                "remove it, or set memory_depth: 2",
            )

    def _reach_problems(self) -> Iterator[Problem]:
        if self.form == "mac" and self.sliding_window is not None:
            yield Problem(("sliding_window",), "mac attends within its segments", "remove it, and set chunk_size")
        if self.form == "mac" and self.conv_size is not None:
            yield Problem(
                ("conv_size",), "mac writes what its attention says, segment by segment: no convolution", "remove it"
            )
        if self.form != "mac" and self.sliding_window is None:
            yield Problem(
                ("sliding_window",), f"{self.form} needs the window of its attention", "set it, e.g. to chunk_size"
            )

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        yield from head_problems(hidden_size, self.num_heads, self.head_dim, self.position)
