"""From a trained model with ternary maps to one for inference, two bits per weight."""

from __future__ import annotations

from torch import nn

from graft.errors import ConfigError
from graft.linears.bitlinear import BitLinear

PACKED_SUFFIX = ".packed"
"""How the names of packed weights end: a checkpoint with such tensors is one of `pack_ternary`'s models."""


def pack_ternary(model: nn.Module) -> list[str]:
    """Replaces every `BitLinear` below ``model`` by its `PackedTernary`; nothing else is touched.

    Norms, embeddings, head, routers and convolutions keep their precision: they are no such layers. The model can no
    longer be trained. On the meta device the packed layers are empty, to be loaded.

    Returns:
        the names of the layers replaced.

    Raises:
        ConfigError: there is none, or one whose quantisation had not come in fully.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
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
