"""From a trained model with ternary maps to one for inference, two bits per weight."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from graft.errors import ConfigError
from graft.linears.bitlinear import TernaryOperands

PACKED_SUFFIX = ".packed"
"""How the names of packed weights end: a checkpoint with such tensors is one of `pack_ternary`'s models."""


@runtime_checkable
class TernaryLayer(Protocol):
    """A layer that multiplies what its `TernaryOperands` make of rows and weights: one matrix, or one per expert."""

    operands: TernaryOperands
    weight: Tensor

    def packed(self) -> nn.Module:
        """The same for inference."""
        ...


def ternary_layers(model: nn.Module) -> dict[str, TernaryLayer]:
    """Every layer below ``model`` with ternary weights, by name."""
    found = (
        (name, m) for name, m in model.named_modules() if isinstance(getattr(m, "operands", None), TernaryOperands)
    )
    return {name: cast(TernaryLayer, module) for name, module in found}


def pack_ternary(model: nn.Module) -> list[str]:
    """Replaces every layer with ternary weights below ``model``, experts' too, by its packed form; nothing else.

    Norms, embeddings, head, routers and convolutions keep their precision: they are no such layers. The model can no
    longer be trained. On the meta device the packed layers are empty, to be loaded.

    Returns:
        the names of the layers replaced.

    Raises:
        ConfigError: there is none, or one whose quantisation had not come in fully.
    """
    found = ternary_layers(model)
    if not found:
        raise ConfigError(
            "the model has no ternary layer to pack",
            where="model.linear",
            expected="{type: bitlinear}, or bitlinear for some role in model.linears",
            fix="train such a model; a dense one cannot be made ternary afterwards without training",
        )
    for name, layer in found.items():
        operands = layer.operands
        if not layer.weight.is_meta and not operands.fully_quantised():
            raise ConfigError(
                f"{name} has seen {int(operands.updates or 0)} of its {operands.warmup_steps} warm-up updates: "
                "it does not compute with ternary weights yet",
                where="model.linear.warmup_steps",
                fix="train on until quantisation has come in fully, then pack",
            )
    for name, layer in found.items():
        model.set_submodule(name, layer.packed())
    return list(found)
