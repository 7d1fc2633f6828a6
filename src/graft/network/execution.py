"""How a network's numbers are computed: the choices, and compiling layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from graft.network.block import Block, BlockOutput
from graft.ops.kernels import Kernels


@dataclass(frozen=True)
class Execution:
    """How the numbers are computed, never which (the fields of ``runtime`` that concern the network).

    Args:
        compile: torch.compile each layer, and the chunk of the loss, outside decoding.
        compile_decode: torch.compile each layer, and the head, for decoding steps of one token.
        activation_checkpointing: "block" keeps only each layer's input and recomputes the rest in the backward pass.
        kernels: "reference" uses the plain form of every operation.
        loss_chunk_bytes: most bytes of fp32 logits the loss holds at once.
    """

    compile: bool = False
    compile_decode: bool = False
    activation_checkpointing: Literal["none", "block"] = "none"
    kernels: Kernels = "auto"
    loss_chunk_bytes: int = 256 * 2**20


def compiled(block: Block) -> Callable[..., BlockOutput]:
    """The block compiled for fixed shapes: equal layers share one compilation, each new batch shape makes another."""
    return torch.compile(block, dynamic=False)


def allow_kinds_of_layers(number: int) -> None:
    """Raises PyTorch's limit of compilations per function, which would send every further kind of layer to eager mode.

    All layers are one function to it; each kind gets the number that a whole program has by default.
    """
    from torch._dynamo import config  # slow to import, and only needed here

    config.recompile_limit = max(config.recompile_limit, 8 * number)
