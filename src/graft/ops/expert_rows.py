"""Experts that are rows of two tables: read, weighed and summed without a copy of the rows that were read.

Expert e has h hidden units; unit j reads with ``down[e, j]`` and writes with ``up[e, j]`` (D channels each):
``y = Σ over chosen e of gate_e · Σ_j act(down[e, j] · x) · up[e, j]`` (PEER, 2407.04153, section 2).

The rows chosen by R positions, [R, K, h, D], are many times larger than everything else here. The fast form never
holds them: products with rows are made a few positions at a time, weighted sums of rows by `embedding_bag`. For the
backward pass it keeps one number per hidden unit and reads the rows again; a table's gradient is summed by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.ops.autocast import full_precision
from graft.ops.kernels import Kernels
from graft.ops.outside_graphs import outside_graphs
from graft.ops.row_gradients import RowGroups, group_rows, rows_only, sums_by_row, wants_rows

Activation = Callable[[Tensor], Tensor]

READ_BYTES_CPU = 2**20
READ_BYTES = 256 * 2**20
"""Bytes of rows that are held at once while products are made: on a CPU what its cache keeps."""


def expert_rows(
    x_RD: Tensor,
    down_EW: Tensor,
    up_EW: Tensor,
    ids_RK: Tensor,
    gates_RK: Tensor,
    activation: Activation,
    *,
    kernels: Kernels = "auto",
) -> Tensor:
    """[R, D]: what the chosen experts say.

    Args:
        x_RD: what they read, in the tables' dtype.
        down_EW: reading rows, W = h·D.
        up_EW: writing rows.
        ids_RK: int64, the K experts of each position (repetitions count).
        gates_RK: their weights.
        activation: of the hidden units, element by element.
        kernels: "reference" gathers all rows at once.

    The tables' gradients are sparse (see `graft.ops.row_gradients`) where the tables are marked so.
    """
    if kernels == "reference":
        return reference(x_RD, down_EW, up_EW, ids_RK, gates_RK, activation)
    return outside_graphs(_expert_rows)(x_RD, down_EW, up_EW, ids_RK, gates_RK, activation)


def reference(
    x_RD: Tensor, down_EW: Tensor, up_EW: Tensor, ids_RK: Tensor, gates_RK: Tensor, activation: Activation
) -> Tensor:
    """`expert_rows` as the formula reads."""
    down_RKhD, up_RKhD = (
        F.embedding(ids_RK, table, sparse=wants_rows(table)).unflatten(-1, (-1, x_RD.shape[1]))
        for table in (down_EW, up_EW)
    )
    with full_precision(x_RD.device):
        hidden_RKh = activation(torch.einsum("rkhd,rd->rkh", down_RKhD, x_RD)) * gates_RK[..., None]
        return torch.einsum("rkh,rkhd->rd", hidden_RKh, up_RKhD)


def _expert_rows(
    x_RD: Tensor, down_EW: Tensor, up_EW: Tensor, ids_RK: Tensor, gates_RK: Tensor, activation: Activation
) -> Tensor:
    result = _ExpertRows.apply(x_RD, down_EW, up_EW, ids_RK, gates_RK, activation)
    assert isinstance(result, Tensor)
    return result


class _ExpertRows(torch.autograd.Function):
    """The fast form. A table is seen as [E·h, D], a row per hidden unit; J = K·h units act at a position."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x_RD: Tensor, down_EW: Tensor, up_EW: Tensor, ids_RK: Tensor, gates_RK: Tensor, activation: Activation
    ) -> Tensor:
        units = down_EW.shape[1] // x_RD.shape[1]
        ids_RJ, x_RD = unit_rows(ids_RK, units), x_RD.contiguous()
        read_RJ = dot_rows(down_EW.view(-1, x_RD.shape[1]), x_RD, ids_RJ)
        weights_RJ = activation(read_RJ) * gates_RK.repeat_interleave(units, dim=1)
        ctx.save_for_backward(x_RD, down_EW, up_EW, ids_RK, gates_RK, read_RJ)
        ctx.activation, ctx.rows_wanted = activation, (wants_rows(down_EW), wants_rows(up_EW))
        return _sum_rows(up_EW.view(-1, x_RD.shape[1]), ids_RJ, weights_RJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RD, down_EW, up_EW, ids_RK, gates_RK, read_RJ = ctx.saved_tensors
        width = x_RD.shape[1]
        units = down_EW.shape[1] // width
        ids_RJ, dy_RD = unit_rows(ids_RK, units), dy_RD.contiguous()
        gates_RJ = gates_RK.repeat_interleave(units, dim=1)
        with torch.enable_grad():
            leaf_RJ = read_RJ.detach().requires_grad_()
            hidden_RJ = ctx.activation(leaf_RJ)
        dweights_RJ = dot_rows(up_EW.view(-1, width), dy_RD, ids_RJ)
        (dread_RJ,) = torch.autograd.grad(hidden_RJ, leaf_RJ, dweights_RJ * gates_RJ)
        hidden_RJ = hidden_RJ.detach()
        dgates_RK = (dweights_RJ * hidden_RJ).unflatten(1, (-1, units)).sum(-1)
        dx_RD = _sum_rows(down_EW.view(-1, width), ids_RJ, dread_RJ)
        groups = group_rows(ids_RJ.flatten(), down_EW.shape[0] * units)
        sums = ((x_RD, dread_RJ), (dy_RD, hidden_RJ * gates_RJ))
        ddown_EW, dup_EW = (
            _table_gradient(groups, sources, weights, units, down_EW.shape[0], rows_wanted=rows) if needed else None
            for (sources, weights), rows, needed in zip(sums, ctx.rows_wanted, ctx.needs_input_grad[1:3], strict=True)
        )
        return dx_RD, ddown_EW, dup_EW, None, dgates_RK, None


def unit_rows(ids_RK: Tensor, units: int) -> Tensor:
    """[R, K·h]: the rows of all hidden units of the experts ``ids_RK``, in a table with a row per unit."""
    if units == 1:
        return ids_RK.contiguous()
    return (ids_RK[..., None] * units + torch.arange(units, device=ids_RK.device)).flatten(1)


@torch.library.custom_op("graft::dot_rows", mutates_args=())
def dot_rows(table_MD: Tensor, x_RD: Tensor, ids_RJ: Tensor) -> Tensor:
    """[R, J]: ``table[ids[r, j]] · x[r]``."""
    out_RJ = x_RD.new_empty(ids_RJ.shape)
    held = READ_BYTES_CPU if x_RD.device.type == "cpu" else READ_BYTES
    step = max(1, held // (ids_RJ.shape[1] * table_MD.shape[1] * table_MD.element_size()))
    with full_precision(x_RD.device):
        for x_CD, ids_CJ, out_CJ in zip(x_RD.split(step), ids_RJ.split(step), out_RJ.split(step), strict=True):
            rows_CJD = table_MD.index_select(0, ids_CJ.flatten()).unflatten(0, ids_CJ.shape)
            torch.bmm(rows_CJD, x_CD[..., None], out=out_CJ[..., None])
    return out_RJ


@dot_rows.register_fake
def _(table_MD: Tensor, x_RD: Tensor, ids_RJ: Tensor) -> Tensor:  # noqa: ARG001
    return x_RD.new_empty(ids_RJ.shape)


def _sum_rows(table_MD: Tensor, ids_RJ: Tensor, weights_RJ: Tensor) -> Tensor:
    """[R, D]: ``Σ_j weights[r, j] · table[ids[r, j]]``."""
    return F.embedding_bag(ids_RJ, table_MD, mode="sum", per_sample_weights=weights_RJ)


def _table_gradient(
    groups: RowGroups, sources_RD: Tensor, weights_RJ: Tensor, units: int, num_experts: int, *, rows_wanted: bool
) -> Tensor:
    """The gradient of a table: ``Σ weights[r, j] · sources[r]`` in the row of each unit (r, j)."""
    position_n = torch.arange(len(weights_RJ), device=weights_RJ.device).repeat_interleave(weights_RJ.shape[1])
    sums_UD = sums_by_row(groups, sources_RD, position_n, weights_RJ.flatten())
    # an expert's units are chosen together, so all h of them are there, one after the other
    rows, sums = groups.rows[::units] // units, sums_UD.view(-1, units * sums_UD.shape[1])
    if rows_wanted:
        return rows_only(rows, sums, num_experts)
    return sums.new_zeros(num_experts, sums.shape[1]).index_copy_(0, rows, sums)
