"""GaLore: Adam in a low-rank subspace of each hidden matrix's gradient, AdamW on everything else."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from graft.config.roles import MATRIX_ROLES
from graft.errors import ConfigError
from graft.optimizers.adamw import fused_supported, update_adamw
from graft.optimizers.galore_adamw_config import GaloreAdamWConfig
from graft.optimizers.grouped import GroupedOptimizer, States, Update
from graft.optimizers.groups import (
    Algorithm,
    Group,
    Named,
    assert_partition,
    build_groups,
    check_overrides,
    named_trainable,
)
from graft.optimizers.rowwise import ROW_UPDATES, rowwise_groups


def takes_galore(config: GaloreAdamWConfig, item: Named) -> bool:
    """Whether a parameter is a hidden matrix with both sides above the rank (and none above ``max_dim``)."""
    shape = item.parameter.shape
    if item.role not in MATRIX_ROLES or len(shape) != 2 or min(shape) <= config.rank:
        return False
    return config.max_dim is None or max(shape) <= config.max_dim


def keeps_rows(proj_type: str, rows: int, cols: int) -> bool:
    """Whether directions among the rows are kept (``Pᵀ G``), or among the columns (``G P``)."""
    shorter = rows < cols
    return {"std": shorter, "reverse_std": not shorter, "left": True, "right": False}[proj_type]


def leading_directions(g_RC: Tensor, rank: int, *, rows: bool) -> Tensor:
    """[R or C, rank] orthonormal: the singular vectors of the largest singular values, in fp32 at least."""
    wide = g_RC.to(torch.promote_types(g_RC.dtype, torch.float32))
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    return (left[:, :rank] if rows else right[:rank].T).to(g_RC.dtype).contiguous()


def update_galore(group: Group, parameters: list[Tensor], states: States) -> None:
    """GaLore with Adam (2403.03507, algorithm 2).

    With G the gradient [R, C] and P the leading singular vectors of the gradient of every ``update_proj_gap``-th
    update (of its rows; of its columns alike): ``N = Adam(Pᵀ G); θ ← θ − lr·wd·θ − lr·scale·P N``. Only P [R, rank]
    and moments [rank, C] are kept. Moments stay when P changes, as there. Deviation: decoupled weight decay.
    """
    beta1, beta2 = group["betas"]
    for p in parameters:
        g_RC, state = cast(Tensor, p.grad), states[p]
        rows = keeps_rows(group["proj_type"], *p.shape)
        updates: int = state.get("updates", 0)
        if updates % group["update_proj_gap"] == 0:
            state["projection"] = leading_directions(g_RC, group["rank"], rows=rows)
        basis: Tensor = state["projection"]
        low = basis.T @ g_RC if rows else g_RC @ basis
        if not updates:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["updates"] = updates = updates + 1
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(low, 1 - beta1)
        v.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        root = (v / (1 - beta2**updates)).sqrt_().add_(group["eps"])
        direction = (m / (1 - beta1**updates)).div_(root)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(basis @ direction if rows else direction @ basis.T, alpha=-group["lr"] * group["scale"])


def build_galore_adamw(config: GaloreAdamWConfig, model: nn.Module) -> GroupedOptimizer:
    """GaLore for the hidden matrices of ``model`` that are larger than its rank, AdamW for its other trainable
    parameters, in groups by role; row-wise updates where a role asks for them.

    Raises:
        ConfigError: ``optimizer.groups`` names a role the model has none of, or a row-wise update that cannot be; or no
            matrix is large enough.
    """
    found = named_trainable(model)
    check_overrides(config, found)
    row_groups, found = rowwise_groups(config, found, model, {"betas": config.betas, "eps": config.eps})
    projected = [item for item in found if takes_galore(config, item)]
    others = [item for item in found if not takes_galore(config, item)]
    if not projected:
        raise ConfigError(
            f"no trainable hidden matrix has both sides above rank {config.rank}, so nothing would be projected",
            where="optimizer.rank",
            fix="lower optimizer.rank, or set optimizer.type: adamw",
        )
    moments: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    settings = {key: getattr(config, key) for key in ("rank", "update_proj_gap", "scale", "proj_type")}
    fused = fused_supported(item.parameter for item in others)
    groups = [
        *build_groups(config, projected, "galore", {**moments, **settings}),
        *build_groups(config, others, "adamw", {**moments, "fused": fused}),
        *row_groups,
    ]
    assert_partition(groups, model)
    updates: dict[Algorithm, Update] = {"galore": update_galore, "adamw": update_adamw, **ROW_UPDATES}
    return GroupedOptimizer(groups, learning_rate=config.learning_rate, updates=updates)
