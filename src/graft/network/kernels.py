"""Giving a model's parts the kernels they shall use, and saying which they do."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from graft.ops.kernels import GRAFT, choose_kernel, require_a_use
from graft.part import Part


def give_kernels(parts: Iterable[Part], asked: str, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every part the kernel it is to use, or none. All or nothing.

    Args:
        parts: of a model.
        asked: ``auto``, ``reference``, or a kernel by name, which only the parts it is meant for use.
        device: where they are.
        dtype: of the operands of their matrix products.

    Raises:
        ConfigError: the named kernel cannot be used, or is meant for none of them.
    """
    tagged = [(part.config.tag, part) for part in parts]
    require_a_use(asked, {tag for tag, _ in tagged})
    chosen = [choose_kernel(tag, part, asked, device, dtype) for tag, part in tagged]
    for (_, part), kernel in zip(tagged, chosen, strict=True):
        part.kernels = "reference" if asked == "reference" else "auto"
        part.kernel = kernel


def kernels_in_use(parts: Iterable[Part]) -> dict[str, str]:
    """Kind of part -> what computes it: graft's own form, its reference, or a kernel's name.

    Several, where parts of one kind differ in what fits them, are joined by ``+``.
    """
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        own = "reference" if part.kernels == "reference" else GRAFT
        found.setdefault(part.config.tag, {})[own if part.kernel is None else part.kernel.name] = None
    return {tag: "+".join(names) for tag, names in found.items()}
