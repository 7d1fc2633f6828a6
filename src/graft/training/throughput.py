"""How fast a run is: positions per second, and the share of the machine's matrix-product rate it uses."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from graft.model import Model
from graft.part import Part


def outer_parts(module: nn.Module) -> Iterator[Part]:
    """The parts below ``module`` that are in no other part (a part counts what is inside it)."""
    for child in module.children():
        if isinstance(child, Part):
            yield child
        else:
            yield from outer_parts(child)


def ends_flops_per_token(model: Model) -> int:
    """Matrix-product FLOPs of the embedding and the head per position."""
    return model.embedding.flops_per_token() + model.head_flops_per_token()


def forward_flops_per_token(model: Model, seq_len: int) -> float:
    """Matrix-product FLOPs of one forward pass per position of a document of ``seq_len`` (multiply and add = 2).

    Every part (once per loop, visible pairs only) and both ends.
    """
    parts = model.config.loops * sum(part.flops_per_token(seq_len) for part in outer_parts(model))
    return parts + ends_flops_per_token(model)


def flops_per_token(model: Model, seq_len: int) -> float:
    """Matrix-product FLOPs of training on one position of a document of ``seq_len``.

    The backward pass takes twice the forward's. Recomputation (activation checkpointing) is not counted: it is work a
    faster implementation would not do.
    """
    return 3.0 * forward_flops_per_token(model, seq_len)


class Stopwatch:
    """Seconds and positions of the training steps since it was last read. Evaluating and saving are not in it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._positions = 0
        self._steps = 0

    def add(self, seconds: float, positions: int) -> None:
        """Counts one step."""
        self._seconds += seconds
        self._positions += positions
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """Positions per second and seconds per step since the last reading; starts over."""
        seconds, positions, steps = self._seconds, self._positions, self._steps
        self.__init__()
        return positions / max(seconds, 1e-9), seconds / max(steps, 1)
