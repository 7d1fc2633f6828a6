"""How tensors start: each parameter draws from its own generator, so an arm's extra part moves no other's numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import nn

Rng = Callable[[str], torch.Generator]
"""Parameter name (local to the module) -> a CPU generator of its own."""


@runtime_checkable
class Initializes(Protocol):
    """A module that owns parameters or buffers directly and fills them itself."""

    def init_parameters(self, rng: Rng) -> None:
        """Fills every parameter and persistent buffer the module owns *directly* (children fill their own)."""
        ...


def generator_for(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter: a pure function of the run's seed and the parameter's full name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def normal_(tensor: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fills ``tensor`` with N(0, std²), drawn on the CPU in fp32: equal on every device, in every dtype."""
    if tensor.device.type == "meta":
        return
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous():
        tensor.normal_(0.0, std, generator=generator)  # without a copy: a table may be half of the memory there is
    else:
        tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter of ``model``. Asserts that each module with parameters of its own knows how."""
    for name, module in model.named_modules():
        owned = list(module.named_parameters(recurse=False))
        if not isinstance(module, Initializes):
            assert not owned, f"{name} ({type(module).__name__}) owns parameters but has no init_parameters"
            continue

        def rng(local: str, prefix: str = name) -> torch.Generator:
            return generator_for(seed, f"{prefix}.{local}")

        module.init_parameters(rng)
