"""Explicit Runge-Kutta methods over the unit of time, with equal steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor, float, int], Tensor]
"""``f(z, t)`` and the number of the evaluation, from 0: same shape as z."""


@dataclass(frozen=True)
class Tableau:
    """Butcher's coefficients of a method with s stages.

    Args:
        nodes: times of the stages within a step (c).
        stages: how much of the earlier slopes a stage starts from (a): row i has i entries.
        weights: how much of each slope the step takes (b).
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "rk4": Tableau(
        (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}
"""Solvers by name: orders 1, 2, 2 and 4."""


def increment(field: Field, z: Tensor, tableau: Tableau, steps: int, weights: Tensor | None = None) -> Tensor:
    """``z(1) − z(0)`` of ``z' = field(z, t)`` with ``z(0) = z``.

    The difference is added up by itself, in fp32 at least. One step of Euler's method is the field exactly.

    Args:
        field: evaluated ``steps · len(tableau.nodes)`` times, in order of time.
        z: the start, any shape.
        tableau: the method.
        steps: equal steps from time 0 to 1.
        weights: [stages] in place of the method's own.

    Returns:
        Shape of z, in its dtype; one step of Euler's method in that of the field, which under autocast may be another.
    """
    if steps == 1 and weights is None and tableau.weights == (1.0,):
        return field(z, 0.0, 0)
    wide = torch.promote_types(z.dtype, torch.float32)
    shares: Sequence[float | Tensor] = tableau.weights if weights is None else weights.to(wide).unbind()
    h, num_stages = 1.0 / steps, len(tableau.nodes)
    moved: Tensor | None = None
    for step in range(steps):
        slopes: list[Tensor] = []
        for stage, (node, row) in enumerate(zip(tableau.nodes, tableau.stages, strict=True)):
            away = _add(moved, zip(row, slopes, strict=True), h)
            here = z if away is None else (z.to(wide) + away).to(z.dtype)
            slopes.append(field(here, (step + node) * h, step * num_stages + stage).to(wide))
        moved = _add(moved, zip(shares, slopes, strict=True), h)
    assert moved is not None
    return moved.to(z.dtype)


def _add(total: Tensor | None, terms: Iterable[tuple[float | Tensor, Tensor]], h: float) -> Tensor | None:
    """``total + h · Σ share · slope``; None stands for zero, and shares of zero are left out."""
    for share, slope in terms:
        if isinstance(share, Tensor) or share != 0.0:
            term = (share * h) * slope
            total = term if total is None else total + term
    return total
