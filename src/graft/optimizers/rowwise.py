"""Updates that touch only the rows of a table that a step used, in memory and in time.

A table's gradient then holds those rows alone (`graft.ops.row_gradients`); every other row and its state stay bit for
bit what they were. Decoupled decay, where a config asks for it, acts on the used rows too and on no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.ops.row_gradients import coalesce_rows, mark_rows, split_rows
from graft.optimizers.grouped import States, Update
from graft.optimizers.groups import Group, Named, build_groups
from graft.optimizers.groups_config import GroupedOptimizerConfig, RowUpdate

PIECE_BYTES = 8 * 2**20
"""An update works on this many bytes of rows at a time: what it holds stays in a cache."""


def update_rowwise_adagrad(group: Group, parameters: list[Tensor], states: States) -> None:
    """Row-wise Adagrad: one fp32 number of state per row.

    With g the gradient of a used row of W numbers: ``s ← s + Σg²/W; θ ← θ − lr·wd·θ; θ ← θ − lr·g / (√s + ε)``.
    Source: Adagrad (Duchi et al., 2011) with the mean over a row in place of each number's own sum, as embedding
    tables are trained in recommendation models (DLRM, 1906.00091). The rate of a row falls with its own use alone.
    """
    for table in parameters:
        state = states[table]
        if not state:
            state["row_sum"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
        for rows, g_UW in _used_rows(table):
            norm_U = torch.linalg.vector_norm(g_UW, dim=1)  # makes no squares as large as the rows
            sums_U = state["row_sum"][rows] + norm_U.float().square() / g_UW.shape[1]
            state["row_sum"][rows] = sums_U
            step_U1 = (group["lr"] / (sums_U.sqrt() + group["eps"]))[:, None].to(g_UW.dtype)
            _move(table, rows, g_UW * step_U1, group)


def update_rowwise_adam(group: Group, parameters: list[Tensor], states: States) -> None:
    """Adam for each row by itself (1412.6980): a row's moments and its count of updates move only when it is used.

    ``n ← n + 1; m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; θ ← θ − lr·wd·θ; θ ← θ − lr·(m/(1−β₁ⁿ)) / (√(v/(1−β₂ⁿ)) + ε)``
    on the used rows, n counted per row: exactly what AdamW would do to a row that saw only the steps which used it.
    """
    beta1, beta2 = group["betas"]
    for table in parameters:
        state = states[table]
        if not state:
            state["row_steps"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        for rows, g_UW in _used_rows(table):
            n_U = state["row_steps"][rows] + 1
            m_UW = state["exp_avg"][rows].lerp_(g_UW, 1 - beta1)
            v_UW = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(g_UW, g_UW, value=1 - beta2)
            state["row_steps"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = n_U, m_UW, v_UW
            unbias1_U1, unbias2_U1 = ((1 - beta**n_U)[:, None].to(g_UW.dtype) for beta in (beta1, beta2))
            change_UW = m_UW.div_(unbias1_U1).mul_(group["lr"]).div_(v_UW.div_(unbias2_U1).sqrt_().add_(group["eps"]))
            _move(table, rows, change_UW, group)


ROW_UPDATES: dict[RowUpdate, Update] = {"rowwise_adagrad": update_rowwise_adagrad, "rowwise_adam": update_rowwise_adam}
_SETTINGS: dict[RowUpdate, tuple[str, ...]] = {"rowwise_adagrad": ("eps",), "rowwise_adam": ("betas", "eps")}


def _used_rows(table: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their gradients, a piece at a time; every row once."""
    gradient = cast(Tensor, table.grad)
    assert gradient.is_sparse, "the table was marked after its gradient was made"
    rows, values_UW = split_rows(coalesce_rows(gradient))
    size = max(1, PIECE_BYTES // (values_UW.element_size() * values_UW.shape[1]))
    yield from zip(rows.split(size), values_UW.split(size), strict=True)


def _move(table: Tensor, rows: Tensor, change_UW: Tensor, group: Group) -> None:
    if group["weight_decay"]:
        change_UW = change_UW.add(table[rows], alpha=group["lr"] * group["weight_decay"])
    table.index_add_(0, rows, change_UW, alpha=-1)


def rowwise_groups(
    config: GroupedOptimizerConfig, found: list[Named], model: nn.Module, settings: Mapping[str, Any]
) -> tuple[list[Group], list[Named]]:
    """The groups of the roles whose update is row-wise, and the parameters that are left for the optimizer's own.

    Marks the tables, so that their gradients hold rows only.

    Args:
        config: says which roles, in ``groups``.
        found: every trainable parameter.
        model: whose modules say which tables can give such gradients (``row_tables``).
        settings: ``betas`` and ``eps``, where a role has none of its own.

    Raises:
        ConfigError: a parameter of such a role has no row gradients.
    """
    able = set(_row_tables(model))
    left: list[Named] = []
    by_update: dict[RowUpdate, list[Named]] = {}
    for item in found:
        override = config.groups.get(item.role)
        update = None if override is None else override.update
        if update is not None and id(item.parameter) not in able:
            raise ConfigError(
                f"{item.name} is not a table that is read row by row, so it cannot be updated by {update}",
                where=f"optimizer.groups.{item.role}.update",
                fix="remove update",
            )
        mark_rows(item.parameter, update is not None)
        (left if update is None else by_update.setdefault(update, [])).append(item)
    groups = [
        group
        for update, members in by_update.items()
        for group in build_groups(config, members, update, {key: settings[key] for key in _SETTINGS[update]})
    ]
    return groups, left


def _row_tables(model: nn.Module) -> Iterator[int]:
    modules = cast(Iterator[nn.Module], model.modules())
    return (id(module.get_parameter(name)) for module in modules for name in getattr(module, "row_tables", ()))
