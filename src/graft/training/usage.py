"""What a model chose (experts, chapters, …): how evenly, and what it has not chosen for long.

Counts stay on their device until someone asks (`UsageMemory.summary`): counting costs an addition per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def coverage(counts_E: Tensor) -> float:
    """Share of the items that were chosen at all."""
    return int((counts_E > 0).sum()) / len(counts_E)


def hot(counts_E: Tensor, threshold: float) -> int:
    """Items chosen more than ``threshold`` times as often as the mean."""
    return int((counts_E > threshold * counts_E.double().mean()).sum())


def entropy(counts_E: Tensor) -> float:
    """Entropy of the choices over its largest value: 1 = all items alike, 0 = always the same one."""
    if len(counts_E) == 1:
        return 1.0
    shares_E = counts_E.double() / counts_E.sum()
    return float(torch.special.entr(shares_E).sum()) / math.log(len(counts_E))


def gini(counts_E: Tensor) -> float:
    """Gini coefficient: 0 = all items alike; always the same one of E: 1 − 1/E."""
    sorted_E = counts_E.double().sort().values
    ranks_E = torch.arange(1, len(sorted_E) + 1, dtype=torch.float64)
    return float(((2 * ranks_E - len(sorted_E) - 1) * sorted_E).sum() / (len(sorted_E) * sorted_E.sum()))


def dead(last_chosen_E: Tensor, step: int, after: int) -> int:
    """Items that were not chosen in the last ``after`` steps up to ``step``.

    Args:
        last_chosen_E: the step each was last chosen in; 0 = never.
        step: steps made, at least ``after`` before anything can be dead.
        after: steps without being chosen.
    """
    return int((step - last_chosen_E >= after).sum())


def summed_over_ranks(usage: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Counts of all training processes together; every process has the same names. One process: the counts."""
    if not usage or not dist.is_available() or not dist.is_initialized():
        return dict(usage)
    summed: dict[str, Tensor] = {}
    for dtype in sorted({sums.dtype for sums in usage.values()}, key=str):
        alike = {name: sums for name, sums in usage.items() if sums.dtype == dtype}
        joint = torch.cat([sums.flatten() for sums in alike.values()])
        dist.all_reduce(joint)
        parts = joint.split([sums.numel() for sums in alike.values()])
        summed |= {name: part.view_as(sums) for (name, sums), part in zip(alike.items(), parts, strict=True)}
    return {name: summed[name] for name in usage}


class UsageMemory:
    """Counts since the last look, and when each item was last chosen.

    Attributes:
        counts: int64 [E] by name, since `forget_counts`.
        last_chosen: int64 [E] by name: the step each item was last chosen in, 0 = never.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        self.last_chosen: dict[str, Tensor] = {}

    def add(self, step: int, usage: Mapping[str, Tensor]) -> None:
        """Adds the counts of step number ``step`` (from 1), by name; sums that are no counts are passed over."""
        for name, counts_E in usage.items():
            if counts_E.is_floating_point():
                continue
            if name not in self.counts:
                self.counts[name] = torch.zeros_like(counts_E)
            if name not in self.last_chosen:
                self.last_chosen[name] = torch.zeros_like(counts_E)
            self.counts[name] = self.counts[name] + counts_E
            self.last_chosen[name] = torch.where(counts_E > 0, step, self.last_chosen[name])

    def names(self) -> Iterable[str]:
        """What was ever counted, in the model's order."""
        return list(self.last_chosen)

    def summary(self, name: str, step: int, *, hot_threshold: float, dead_after: int) -> dict[str, float | int | None]:
        """What the counts say about one thing that is counted. Reads them from the device.

        Shares and spreads are None when nothing was chosen since the last look (every step was skipped).

        Args:
            name: what was counted.
            step: steps made.
            hot_threshold: see `hot`.
            dead_after: see `dead`.
        """
        last_chosen_E = self.last_chosen[name].cpu()
        counts_E = self.counts.get(name, torch.zeros_like(last_chosen_E)).cpu()
        total = int(counts_E.sum())
        return {
            "items": len(counts_E),
            "chosen": total,
            "coverage": coverage(counts_E) if total else None,
            "hot": hot(counts_E, hot_threshold) if total else None,
            "entropy": entropy(counts_E) if total else None,
            "gini": gini(counts_E) if total else None,
            "dead": dead(last_chosen_E, step, dead_after),
        }

    def forget_counts(self) -> None:
        """Starts counting anew; when things were last chosen is remembered."""
        self.counts = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything, as tensors."""
        return {
            "counts": {name: counts.cpu() for name, counts in self.counts.items()},
            "last_chosen": {name: steps.cpu() for name, steps in self.last_chosen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Puts back what `state_dict` returned, onto ``device``."""
        self.counts = {name: counts.to(device) for name, counts in state["counts"].items()}
        self.last_chosen = {name: steps.to(device) for name, steps in state["last_chosen"].items()}
