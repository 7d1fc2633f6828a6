"""Roles of parameters: what decides a tensor's optimizer, weight decay and telemetry. Never a substring of its name."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal[
    "embedding",
    "head",
    "norm",
    "bias",
    "scalar",
    "conv",
    "attention",
    "mlp",
    "retention",
    "mamba",
    "ode",
    "titans",
    "recurrence",
    "router",
    "expert",
    "expert_table",
    "memory_bank",
    "memory_layer",
    "lora",
    "other",
]
ROLES: tuple[Role, ...] = get_args(Role)

NO_DECAY: frozenset[Role] = frozenset({"norm", "bias", "scalar", "memory_bank", "expert_table"})
"""Roles without weight decay unless a config says otherwise."""

DENSE_ROLES: frozenset[Role] = frozenset({"router"})
"""Roles whose linear maps stay dense, in full precision, unless ``model.linears`` names them: a router's choices jump
with small changes of its scores."""

MATRIX_ROLES: frozenset[Role] = frozenset(
    {"attention", "mlp", "retention", "mamba", "ode", "titans", "recurrence", "expert", "memory_layer", "lora", "other"}
)
"""Roles whose 2-D (or batched 2-D) tensors are hidden matrices: the ones Muon may take."""
