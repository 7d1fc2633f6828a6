"""What the contracts are run on: a model built from a config, loud enough for a leak to show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graft.config.experiment import Experiment
from graft.config.families import ObjectiveConfig
from graft.config.model import ModelConfig
from graft.initialization import generator_for
from graft.model import Model, build_model

TOLERANCE = 1e-9
"""Largest difference, relative to the largest value, that two fp64 computations of the same thing may show."""


class ContractBroken(AssertionError):
    """A contract does not hold; the message says which, where and by how much."""


@dataclass(frozen=True)
class Subject:
    """A model to examine.

    Args:
        config: the network.
        objective: the loss, for the contracts that train.
        seq_len: positions of the sequences that are tried; pick it longer than the windows inside.
        vocab_size: ids that are used.
        seed: seeds weights and tokens.
    """

    config: ModelConfig
    objective: ObjectiveConfig
    seq_len: int = 12
    vocab_size: int = 31
    seed: int = 0

    @classmethod
    def of(cls, experiment: Experiment) -> Subject:
        """The network and objective of an experiment, over a few ids only (the size of the vocabulary is no part)."""
        multiple = min(experiment.model.head.pad_vocab_to_multiple_of, 8)
        head = experiment.model.head.replace(pad_vocab_to_multiple_of=multiple)
        return cls(experiment.model.replace(vocab_size=None, head=head), experiment.objective)

    @cached_property
    def model(self) -> Model:
        """The model in fp64, evaluating, all parameters moved off their quiet start (see `loud`)."""
        return self.build()

    def build(self, *, dtype: torch.dtype = torch.float64) -> Model:
        """A fresh copy of `model`: same numbers every time."""
        size = self.config.vocab_size or self.vocab_size
        model = build_model(self.config, size, seed=self.seed, device="cpu", dtype=dtype)
        loud(model, self.seed)
        return model.eval()

    def tokens(self, batch_size: int, seq_len: int | None = None, *, salt: str = "tokens") -> Tensor:
        """[B, T] random ids, a function of (seed, salt)."""
        shape = (batch_size, seq_len or self.seq_len)
        return torch.randint(self.vocab_size, shape, generator=generator_for(self.seed, salt))

    def other(self, ids: Tensor) -> Tensor:
        """Ids that differ from ``ids`` everywhere."""
        return (ids + 1 + self.vocab_size // 3) % self.vocab_size


@torch.no_grad()
def loud(model: torch.nn.Module, seed: int) -> None:
    """Adds noise to every parameter.

    At the start weights are small and some outputs are zero, so that a leak would hide below the tolerance; a contract
    must hold for any weights, and with these it shows.
    """
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator_for(seed, f"loud/{name}"))
        parameter.add_(noise.to(parameter.dtype))


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raises ContractBroken unless the two agree relative to the largest expected value."""
    if actual.shape != expected.shape:
        raise ContractBroken(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not torch.isfinite(actual).all():
        raise ContractBroken(f"{what}: not finite")
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), 1e-12)
    error = (actual - expected).abs().max().item() / scale
    if not error <= tolerance:
        raise ContractBroken(f"{what}: differs by {error:.3g} of the largest value (allowed {tolerance:.0e})")
