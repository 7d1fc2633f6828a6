"""Parameters sorted into groups of equal settings, by role: never by a substring of a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from graft.config.roles import NO_DECAY, ROLES, Role
from graft.errors import ConfigError
from graft.optimizers.groups_config import GroupedOptimizerConfig, RoleOverride, RowUpdate
from graft.part import parameter_roles

Algorithm = Literal["adamw", "muon", "galore"] | RowUpdate
Group = dict[str, Any]
"""One entry of ``optimizer.param_groups``."""


class Named(NamedTuple):
    """A trainable parameter with its full name and role."""

    name: str
    role: Role
    parameter: nn.Parameter


@dataclass(frozen=True)
class GroupRow:
    """One line of the table of groups.

    Args:
        role: of every parameter in the group.
        algorithm: what updates it.
        num_tensors: parameters in the group.
        num_parameters: numbers in them.
        lr_multiplier: factor on the peak learning rate.
        weight_decay: decoupled weight decay.
    """

    role: Role
    algorithm: Algorithm
    num_tensors: int
    num_parameters: int
    lr_multiplier: float
    weight_decay: float


def named_trainable(model: nn.Module) -> list[Named]:
    """Every parameter that requires a gradient, once, in the model's order.

    A tied parameter has the role of the first module that owns it: a head tied to the embedding is embedding.
    """
    roles = parameter_roles(model)
    return [Named(name, roles[name], p) for name, p in model.named_parameters() if p.requires_grad]


def check_overrides(config: GroupedOptimizerConfig, found: list[Named]) -> None:
    """Raises ConfigError when ``optimizer.groups`` names a role that no trainable parameter has."""
    present = {item.role for item in found}
    for role in config.groups:
        if role not in present:
            tied = "; the head may be tied to the embedding, which then decides" if role == "head" else ""
            raise ConfigError(
                f"no trainable parameter of the model has the role '{role}', so these settings do nothing",
                where=f"optimizer.groups.{role}",
                expected=f"one of the roles present: {', '.join(r for r in ROLES if r in present)}",
                fix=f"remove the entry{tied}",
            )


def build_groups(
    config: GroupedOptimizerConfig,
    found: list[Named],
    algorithm: Algorithm,
    settings: Mapping[str, Any],
    *,
    lr_multiplier: float = 1.0,
) -> list[Group]:
    """The parameter groups of one algorithm, one per role, in the order of `graft.config.roles.ROLES`.

    Args:
        config: peak rate, weight decay and the overrides per role.
        found: the parameters this algorithm updates.
        algorithm: written into the groups.
        settings: the algorithm's own settings, equal in all groups; ``betas`` and ``eps`` give way to a role's.
        lr_multiplier: the algorithm's factor on the peak, times a role's own.

    Returns:
        Groups with ``params``, ``name``, ``role``, ``algorithm``, ``lr``, ``lr_multiplier``, ``weight_decay`` and
        the settings. Roles in `NO_DECAY` have no weight decay unless their override says so.
    """
    groups: list[Group] = []
    for role in ROLES:
        members = [item.parameter for item in found if item.role == role]
        if not members:
            continue
        override = config.groups.get(role, RoleOverride())
        decay = 0.0 if role in NO_DECAY else config.weight_decay
        multiplier = lr_multiplier * (1.0 if override.lr_multiplier is None else override.lr_multiplier)
        group: Group = {
            "params": members,
            "name": f"{algorithm}/{role}",
            "role": role,
            "algorithm": algorithm,
            "lr": config.learning_rate * multiplier,
            "lr_multiplier": multiplier,
            "weight_decay": decay if override.weight_decay is None else override.weight_decay,
            **settings,
        }
        for key in ("betas", "eps"):
            if key in settings and getattr(override, key) is not None:
                group[key] = getattr(override, key)
        groups.append(group)
    return groups


def assert_partition(groups: list[Group], model: nn.Module) -> None:
    """Asserts that every trainable parameter of ``model`` is in exactly one group, and nothing else is."""
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two optimizer groups"
    assert set(grouped) == trainable, "the optimizer groups are not the model's trainable parameters"


def describe_groups(optimizer: torch.optim.Optimizer) -> list[GroupRow]:
    """The table of groups that a run prints at its start, one row per group."""
    return [
        GroupRow(
            role=group["role"],
            algorithm=group["algorithm"],
            num_tensors=len(group["params"]),
            num_parameters=sum(p.numel() for p in group["params"]),
            lr_multiplier=group["lr_multiplier"],
            weight_decay=group["weight_decay"],
        )
        for group in optimizer.param_groups
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets ``lr = peak · factor · lr_multiplier`` in every group; returns ``peak · factor``.

    Args:
        optimizer: built by a config of this family; ``optimizer.defaults["lr"]`` is the peak.
        factor: the schedule's share of the peak for the coming update.
    """
    rate = optimizer.defaults["lr"] * factor
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]
    return rate
