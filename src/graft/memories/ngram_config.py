"""Config of the n-gram memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import MemoryConfig, Norm
from graft.norms.rms_norm_config import RMSNormConfig


class NgramConfig(MemoryConfig):
    """Engram (2601.07372): hashed n-grams of the last tokens look vectors up, and the stream gates them."""

    implementation = "graft.memories.ngram:Ngram"
    norms_inside = True
    type: Literal["ngram"] = knob("ngram", "tag")
    orders: tuple[int, ...] = knob((2, 3), "lengths of the n-grams in tokens, rising; as published", min_length=1)
    num_hash_heads: int = knob(
        8,
        "tables per order, each with a hash of its own, so that two n-grams rarely collide in all; as published",
        ge=1,
    )
    table_size: int = knob(
        doc="rows per table at least: the tables get the next primes, each another; more = fewer collisions", ge=2
    )
    row_dim: int = knob(
        doc="channels of a row; all rows of a position together are orders · num_hash_heads · row_dim", ge=1
    )
    conv_size: int | None = knob(
        4,
        "taps of the causal convolution over what was read, the longest order apart; null = none; 4 as published",
        ge=2,
    )
    gate_norm: Norm = knob(
        doc="norm of stream and keys before the gate, and of what the convolution reads; RMSNorm as published",
        factory=RMSNormConfig,
    )
    canonicalize: bool = knob(
        True, "ids whose texts differ only in case, width or surrounding spaces count as one, as published"
    )
    zero_init_output: bool = knob(
        False,
        "values start at zero, so that the memory adds nothing at first: for a network trained without it "
        "(false as published, where only the convolution starts at zero)",
    )

    def silent_at_start(self) -> bool:
        return self.zero_init_output

    def problems(self) -> Iterator[Problem]:
        if self.orders and (self.orders[0] < 1 or any(b <= a for a, b in pairwise(self.orders))):
            yield Problem(("orders",), f"{list(self.orders)} are no rising lengths of n-grams", "for example [2, 3]")
