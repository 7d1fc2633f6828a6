"""One linear map per expert, each over its own rows: the product that a mixture of experts is made of.

Rows come sorted by expert, so an expert's rows are neighbours: expert e owns rows ``ends[e-1]`` to ``ends[e]``. How
many each owns is data; the shapes are not, and nothing is cut off at a capacity. In this module M counts rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.autocast import matmul_operand
from graft.ops.kernels import Kernels
from graft.ops.outside_graphs import outside_graphs

GROUPED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What PyTorch's grouped product takes."""

GROUPED_ALIGNMENT = 16
"""Bytes that PyTorch's grouped product wants its rows to be a multiple of."""


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor, *, kernels: Kernels = "auto") -> Tensor:
    """``y = W_e x`` for every row, e its expert; [M, F], in autocast's dtype where that is on.

    PyTorch's grouped product where it takes the operands, else one batched product over the experts' rows padded to
    the longest; both are one operation to autograd (once differentiable) and to the compiler.

    Args:
        x_MD: rows, sorted by expert.
        weight_EFD: a matrix per expert.
        ends_E: int32, the row after each expert's last one; the last entry is M.
        kernels: "reference" multiplies expert by expert.
    """
    x_MD, weight_EFD = matmul_operand(x_MD), matmul_operand(weight_EFD)
    if kernels == "reference":
        return outside_graphs(reference_grouped_linear)(x_MD, weight_EFD, ends_E)
    return _grouped_linear(x_MD, weight_EFD, ends_E)


def reference_grouped_linear(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The same, as a loop over the experts that have rows."""
    ends = ends_E.tolist()
    parts = [x_MD[a:b] @ weight_EFD[e].T for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    return torch.cat(parts) if parts else x_MD.new_zeros(0, weight_EFD.shape[1])


def _takes(*operands: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these (contiguous) operands."""
    return hasattr(F, "grouped_mm") and all(
        t.dtype in GROUPED_DTYPES
        and t.shape[-1] * t.element_size() % GROUPED_ALIGNMENT == 0
        and t.data_ptr() % GROUPED_ALIGNMENT == 0
        for t in operands
    )


@torch.library.custom_op("graft::grouped_linear", mutates_args=())
def _grouped_linear(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    x_MD, weight_EFD = x_MD.contiguous(), weight_EFD.contiguous()
    if _takes(x_MD, weight_EFD) and weight_EFD.shape[1] * x_MD.element_size() % GROUPED_ALIGNMENT == 0:
        return F.grouped_mm(x_MD, weight_EFD.transpose(1, 2), offs=ends_E)
    places = _Places(ends_E, len(x_MD))
    return places.taken(torch.bmm(places.put(x_MD), weight_EFD.transpose(1, 2)))


@torch.library.custom_op("graft::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(d_y_MF: Tensor, x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    d_y_MF, x_MD, weight_EFD = d_y_MF.contiguous(), x_MD.contiguous(), weight_EFD.contiguous()
    if _takes(d_y_MF, x_MD, weight_EFD):
        d_x_MD = F.grouped_mm(d_y_MF, weight_EFD, offs=ends_E)
        return d_x_MD, F.grouped_mm(d_y_MF.t(), x_MD, offs=ends_E)
    places = _Places(ends_E, len(x_MD))
    d_y_padded = places.put(d_y_MF)
    d_x_MD = places.taken(torch.bmm(d_y_padded, weight_EFD))
    return d_x_MD, torch.bmm(d_y_padded.transpose(1, 2), places.put(x_MD))


class _Places:
    """Where rows stand when every expert has room for as many as the one with most.

    Args:
        ends_E: the row after each expert's last one.
        num_rows: M.
    """

    def __init__(self, ends_E: Tensor, num_rows: int):
        starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1])).long()
        counts_E = ends_E - starts_E
        self.experts, self.room = len(ends_E), int(counts_E.max())
        expert_M = torch.repeat_interleave(counts_E, output_size=num_rows)
        row_M = torch.arange(num_rows, device=ends_E.device)
        self.place_M = expert_M * self.room + row_M - starts_E[expert_M]

    def put(self, x_MD: Tensor) -> Tensor:
        """[E, room, D]: each expert's rows, then zeros."""
        padded = x_MD.new_zeros(self.experts * self.room, x_MD.shape[1])
        return padded.index_copy_(0, self.place_M, x_MD).view(self.experts, self.room, -1)

    def taken(self, padded: Tensor) -> Tensor:
        """[M, ·]: the rows back in their order."""
        return padded.flatten(0, 1).index_select(0, self.place_M)


@_grouped_linear.register_fake
def _(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:  # noqa: ARG001 (the same arguments)
    return x_MD.new_empty(x_MD.shape[0], weight_EFD.shape[1])


@_grouped_linear_backward.register_fake
def _(d_y_MF: Tensor, x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x_MD.new_empty(x_MD.shape), weight_EFD.new_empty(weight_EFD.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 (autograd's signature)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_y_MF: Tensor) -> tuple[Tensor | None, ...]:
    return *_grouped_linear_backward(d_y_MF, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_backward, setup_context=_keep)
