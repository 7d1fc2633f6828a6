"""Parameters, FLOPs and decode state of a model, counted part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from graft.config.roles import Role
from graft.model import Model
from graft.part import Part, parameter_roles, tensors_of


@dataclass(frozen=True)
class PartCost:
    """One part at one physical layer.

    Args:
        name: where it is in the model.
        type: its variant.
        parameters: its parameters.
        active_parameters: those that take part in computing one position.
        forward_flops_per_token: FLOPs per position of one forward pass, every loop counted.
        state_bytes: decode state per sequence of ``seq_len`` positions, every loop counted.
    """

    name: str
    type: str
    parameters: int
    active_parameters: int
    forward_flops_per_token: float
    state_bytes: int


def outermost_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Part]]:
    """Every part that is not inside another part, with its name."""
    if isinstance(module, Part):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from outermost_parts(child, f"{prefix}.{name}" if prefix else name)


def part_costs(model: Model, seq_len: int, state_dtype: torch.dtype) -> list[PartCost]:
    """The cost of each part of ``model`` for documents of ``seq_len`` positions. An encoder has no decode state."""
    loops, decodes = model.config.loops, not model.config.bidirectional
    return [
        PartCost(
            name=name,
            type=part.config.tag,
            parameters=sum(p.numel() for p in part.parameters()),
            active_parameters=part.active_parameters(),
            forward_flops_per_token=loops * part.flops_per_token(seq_len),
            state_bytes=loops * part.state_bytes(seq_len, state_dtype) if decodes else 0,
        )
        for name, part in outermost_parts(model)
    ]


def idle_shared_parameters(model: Model) -> int:
    """Parameters that parts share and that computing one position leaves out, if no two parts read the same ones."""
    read: Counter[nn.Module] = Counter()
    for part in model.parts():
        for module, count in part.active_shared().items():
            read[module] += count
    sizes = {module: sum(p.numel() for p in module.parameters()) for module in model.shared.values()}
    return sum(max(0, size - read[module]) for module, size in sizes.items())


def embedding_state_bytes(model: Model, dtype: torch.dtype) -> int:
    """Decode state of the embedding's convolution, per sequence; 0 in an encoder, which has no decode state."""
    if model.config.bidirectional:
        return 0
    state = model.embedding.init_state(1, device=torch.device("meta"), dtype=dtype)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))


def parameters_by_role(model: Model) -> dict[Role, int]:
    """Parameters of each role that occurs; a tied tensor counts once."""
    roles = parameter_roles(model)
    counts: Counter[Role] = Counter()
    for name, parameter in model.named_parameters():
        counts[roles[name]] += parameter.numel()
    return dict(counts)


def parameters_by_part(model: Model) -> dict[str, int]:
    """Parameters of each kind of part; what belongs to no part (embedding, norms, head) goes by its role.

    The values add up to all parameters.
    """
    owner = {id(p): part for _, part in outermost_parts(model) for p in part.parameters()}
    roles = parameter_roles(model)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = owner.get(id(parameter))
        kind = part.config.tag if part is not None else roles[name]
        counts[kind] += parameter.numel()
    return dict(counts)
