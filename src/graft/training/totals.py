"""Sums over the targets of a step, of several steps, or of an evaluation, and the means people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graft.data.batch import Batch
from graft.objectives.base import LossTerms
from graft.part import add_sums


@dataclass
class Totals:
    """Named sums with their denominators. The sums stay on the device: reading them (`means`) is what waits for it.

    Args:
        num_targets: targets the sums are over: the denominator of the loss.
        num_bytes: UTF-8 bytes those targets stand for.
        num_positions: positions, padding included: the denominator of auxiliary sums.
        sums: detached scalars by name; ``ce`` is the cross-entropy in nats, ``aux`` is summed over positions, all
            others over targets.
        usage: counts of what the model chose, by name (`graft.model.Features.usage`).
    """

    num_targets: int = 0
    num_bytes: int = 0
    num_positions: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    usage: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Totals:
        """The denominators of ``batches``, known before anything is computed from them; no sums yet."""
        return cls(
            sum(b.num_targets for b in batches),
            sum(b.num_bytes for b in batches),
            sum(b.num_positions for b in batches),
        )

    def share(self, terms: LossTerms) -> Tensor:
        """What some terms add to the loss of all: their main sum per target, their auxiliary one per position."""
        return terms.main / max(1, self.num_targets) + terms.aux / self.num_positions

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds named scalars, in double precision where the device has it."""
        for name, value in sums.items():
            wide = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide

    def count(self, usage: Mapping[str, Tensor]) -> None:
        """Adds named counts."""
        self.usage = add_sums(self.usage, usage)

    def merge(self, other: Totals) -> None:
        """Adds another's sums and denominators."""
        self.num_targets += other.num_targets
        self.num_bytes += other.num_bytes
        self.num_positions += other.num_positions
        self.add(other.sums)
        self.count(other.usage)

    def means(self) -> dict[str, float | None]:
        """What the sums say per target.

        ``loss`` is the cross-entropy in nats per target, ``perplexity`` its exponential and ``bpb`` the same
        cross-entropy in bits per UTF-8 byte (None where the targets stand for no bytes): auxiliary terms never enter
        them. Every other sum is given as its mean under its own name; ``aux`` is left out when it is zero (no part has
        any). Without targets (every step of the window was skipped) the three are None.
        """
        values = {name: float(value) for name, value in self.sums.items()}
        ce = values.pop("ce", None)
        aux = values.pop("aux", None)
        means: dict[str, float | None] = {"loss": None, "perplexity": None, "bpb": None}
        if ce is not None and self.num_targets:
            means["loss"] = ce / self.num_targets
            means["perplexity"] = math.exp(min(ce / self.num_targets, 700.0))  # exp(710) overflows a double
            means["bpb"] = ce / math.log(2) / self.num_bytes if self.num_bytes else None
        means |= {name: value / self.num_targets for name, value in values.items() if self.num_targets}
        if aux and self.num_positions:
            means["aux"] = aux / self.num_positions
        return means

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and integers."""
        return {
            "num_targets": self.num_targets,
            "num_bytes": self.num_bytes,
            "num_positions": self.num_positions,
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "usage": {name: counts.cpu() for name, counts in self.usage.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Totals:
        """What `state_dict` wrote, its sums on ``device``."""
        sums = {name: value.to(device) for name, value in state["sums"].items()}
        usage = {name: counts.to(device) for name, counts in state["usage"].items()}
        return cls(state["num_targets"], state["num_bytes"], state["num_positions"], sums, usage)
