"""Which roles the linear maps of a network have."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graft.config.families import LinearConfig
from graft.config.roles import ROLES, Role
from graft.errors import ConfigError


def check_linears(model: nn.Module, linears: Mapping[Role, LinearConfig]) -> None:
    """Raises ConfigError when ``model.linears`` names a role of which the network has no linear map.

    Args:
        model: the network, built.
        linears: kinds by role.
    """
    present = {m.role for m in model.modules() if isinstance(getattr(m, "config", None), LinearConfig)}
    for role in linears:
        if role not in present:
            raise ConfigError(
                f"no linear map of the network has the role '{role}', so this entry does nothing",
                where=f"model.linears.{role}",
                expected=f"one of the roles present: {', '.join(r for r in ROLES if r in present) or 'none'}",
                fix="remove the entry, or name another role",
            )
