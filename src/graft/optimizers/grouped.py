"""One optimizer whose groups name the algorithm that updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graft.optimizers.groups import Algorithm, Group

States = Mapping[Tensor, dict[str, Any]]
"""What an optimizer keeps for each parameter; an empty dict before its first update."""

Update = Callable[[Group, list[Tensor], States], None]
"""One update of those parameters of a group that have a gradient."""


class GroupedOptimizer(torch.optim.Optimizer):
    """Updates every group by the algorithm it names.

    Args:
        groups: from `graft.optimizers.groups.build_groups`.
        learning_rate: the peak.
        updates: how, for each algorithm that occurs.
    """

    def __init__(self, groups: list[Group], *, learning_rate: float, updates: Mapping[Algorithm, Update]):
        super().__init__(groups, {"lr": learning_rate})
        self._updates = {name: updates[name] for name in {group["algorithm"] for group in groups}}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes the loss with gradients, as in every torch optimizer; rarely used.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._updates[group["algorithm"]](group, parameters, self.state)
        return loss
