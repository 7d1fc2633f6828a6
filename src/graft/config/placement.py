"""In which layers of its block a part stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from graft.config.base import Config, Problem, knob


class LayerRule(Config):
    """Layers by a rule, counted among those that have the part's block: exactly one of first, last and every."""

    first: int | None = knob(None, "the first this many", ge=1)
    last: int | None = knob(None, "the last this many", ge=1)
    every: int | None = knob(None, "one of this many, from the first on", ge=1)

    def problems(self) -> Iterator[Problem]:
        given = [name for name in ("first", "last", "every") if getattr(self, name) is not None]
        if len(given) != 1:
            yield Problem((), f"{len(given)} of first, last and every are set", "set exactly one")

    def of(self, own: Sequence[int]) -> Sequence[int]:
        """The layers chosen among ``own``, in order."""
        if self.first is not None:
            return own[: self.first]
        return own[-self.last :] if self.last is not None else own[:: self.every]


Layers = LayerRule | Literal["none"] | tuple[int, ...]
"""``{first: 5}``, ``{last: 5}``, ``{every: 3}``, indices of physical layers (-1 the last), none."""


def chosen_layers(layers: Layers | None, own: Sequence[int], num_layers: int) -> frozenset[int]:
    """The physical layers in which a part stands.

    Args:
        layers: the part's ``layers``; None = all of its block.
        own: the physical layers that have its block.
        num_layers: physical layers of the model.
    """
    if layers is None:
        return frozenset(own)
    if isinstance(layers, LayerRule):
        return frozenset(layers.of(own))
    if layers == "none":
        return frozenset()
    return frozenset(index + num_layers if index < 0 else index for index in layers)


def placement_problem(layers: Layers | None, own: Sequence[int], num_layers: int) -> tuple[str, str] | None:
    """What is wrong with a part's ``layers`` and what to do, or None; arguments as in `chosen_layers`."""
    if isinstance(layers, LayerRule):
        count = layers.first or layers.last or 1
        if count > len(own):
            return f"{count} layers of a block that is in {len(own)}", f"at most {len(own)}"
        return None
    if not isinstance(layers, tuple):
        return None
    outside = [index for index in layers if not -num_layers <= index < num_layers]
    if outside:
        return (
            f"{_listed(outside)} is outside the {num_layers} layers",
            f"use 0 to {num_layers - 1}, or -1 to count back",
        )
    strange = [index for index in layers if index % num_layers not in own]
    if strange:
        return f"layer {_listed(strange)} has another block", f"the block is in {_listed(own)}"
    if len(chosen_layers(layers, own, num_layers)) < len(layers):
        return f"[{_listed(layers)}] names a layer twice", "name each once"
    if not layers:
        return "the list is empty", "write none, or name layers"
    return None


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))
