"""Cross-entropy of a linear head, without ever holding all logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _autograd

from graft.ops.activations import soft_cap
from graft.ops.autocast import matmul_dtype
from graft.shapes import Float, Int


class CrossEntropySums(NamedTuple):
    """Sums over the targets that are not ignored, fp32 (fp64 for fp64 inputs).

    Args:
        loss: ``ce + z_loss_coef · z``, differentiable.
        ce: Σ (logsumexp(logits) − logits[target]) in nats, detached.
        z: Σ logsumexp(logits)², detached.
    """

    loss: Tensor
    ce: Tensor
    z: Tensor


class HeadLoss(NamedTuple):
    """What is computed from the logits.

    Args:
        vocab_size: columns that count; those after it pad the vocabulary.
        softcap: logits become ``c·tanh(logits/c)``; None = they stay.
        z_loss_coef: weight of z.
        ignore_index: a target with this value is not predicted: it adds nothing to any sum.
    """

    vocab_size: int
    softcap: float | None = None
    z_loss_coef: float = 0.0
    ignore_index: int = -100


def linear_cross_entropy(
    x_TD: Float[Tensor, "T D"],
    weight_VD: Float[Tensor, "rows D"],
    targets_T: Int[Tensor, " T"],
    *,
    bias_V: Float[Tensor, " rows"] | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    z_loss_coef: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int = 256 * 2**20,
    compile: bool = False,
    kernels: Literal["auto", "reference"] = "auto",
) -> CrossEntropySums:
    """Cross-entropy and z-loss (PaLM, 2204.02311) of ``softcap(x Wᵀ + b)``, fused with the head.

    Positions are taken in chunks whose fp32 logits fill at most ``chunk_bytes``; each chunk's gradients are computed
    right after its loss, while its logits are at hand. Recomputing them in the backward pass instead would cost a third
    more matrix products; the price paid here is that one gradient of W is held from forward to backward, and that only
    the weighted sum ``loss`` is differentiable, ce and z are reports. PyTorch's own chunked function
    (``F.linear_cross_entropy``) has neither soft-cap nor z-loss.

    z is computed on the soft-capped logits, the ones that enter the cross-entropy (as PaLM does without a cap).
    Matrix products run in autocast's dtype where it is on, else in that of x; everything else, and the sum of W's
    gradient over chunks, in fp32 (fp64 for fp64 inputs).

    Args:
        x_TD: features, one row per position.
        weight_VD: the head's matrix; it may have more rows than ids (padding).
        targets_T: ids to predict.
        bias_V: the head's bias.
        vocab_size: ids that can be predicted; None = all rows.
        softcap: see `HeadLoss`.
        z_loss_coef: see `HeadLoss`.
        ignore_index: see `HeadLoss`.
        chunk_bytes: most bytes of fp32 logits held at once; at least one row is.
        compile: torch.compile the work on a chunk.
        kernels: "reference" computes all logits at once, see `reference_linear_cross_entropy`.
    """
    form = HeadLoss(vocab_size or weight_VD.shape[0], softcap, z_loss_coef, ignore_index)
    if kernels == "reference":
        return reference_linear_cross_entropy(x_TD, weight_VD, targets_T, bias_V, form)
    num_rows = max(1, chunk_bytes // (4 * weight_VD.shape[0]))
    num_chunks = max(1, math.ceil(x_TD.shape[0] / num_rows))
    num_rows = max(1, math.ceil(x_TD.shape[0] / num_chunks))  # chunks of one size: one shape to compile
    plan = (form, num_rows, compile, matmul_dtype(x_TD))
    differentiable = any(t is not None and t.requires_grad for t in (x_TD, weight_VD, bias_V))
    if torch.is_grad_enabled() and differentiable:
        return CrossEntropySums(*_Chunked.apply(x_TD, weight_VD, bias_V, targets_T, plan))
    return _run(x_TD, weight_VD, bias_V, targets_T, plan, _Wanted())[0]


def reference_linear_cross_entropy(
    x_TD: Float[Tensor, "T D"],
    weight_VD: Float[Tensor, "rows D"],
    targets_T: Int[Tensor, " T"],
    bias_V: Float[Tensor, " rows"] | None,
    form: HeadLoss,
) -> CrossEntropySums:
    """The definition of `linear_cross_entropy`, with all logits at once and PyTorch's own gradients."""
    logits_TV = F.linear(x_TD, weight_VD, bias_V)[:, : form.vocab_size]
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if form.softcap is not None:
        logits_TV = soft_cap(logits_TV, form.softcap)
    ce = F.cross_entropy(logits_TV, targets_T, reduction="sum", ignore_index=form.ignore_index)
    z = logits_TV.logsumexp(-1).square().masked_fill(targets_T == form.ignore_index, 0.0).sum()
    return CrossEntropySums(ce + form.z_loss_coef * z, ce.detach(), z.detach())


_Plan = tuple[HeadLoss, int, bool, torch.dtype]
"""What is computed, rows per chunk, whether to compile, dtype of the matrix products."""


class _Wanted(NamedTuple):
    """Whose gradients are computed."""

    x: bool = False
    weight: bool = False
    bias: bool = False


class _Chunked(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums, grads = _run(x_TD, weight_VD, bias_V, targets_T, plan, _Wanted(*ctx.needs_input_grad[:3]))
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(sums.ce, sums.z)
        return sums.loss, sums.ce, sums.z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale, multiply = grad_outputs[0], torch.mul if _graph_is_kept() else Tensor.mul_
        scaled = (None if grad is None else multiply(grad, scale.to(grad.dtype)) for grad in ctx.saved_tensors)
        return (*scaled, None, None)


def _graph_is_kept() -> bool:
    """Whether the backward pass now running may be followed by another through the same graph (``retain_graph``)."""
    ask: Callable[[], bool] | None = getattr(_autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of the loss by x, W and b, in their dtypes; None where not wanted."""


def _run(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, plan: _Plan, wanted: _Wanted
) -> tuple[CrossEntropySums, _Grads]:
    """All chunks in turn: the sums, and the gradients that are wanted."""
    form, num_rows, compile, dtype = plan
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    cast_VD = weight_VD.to(dtype)
    cast_bias_V = None if bias_V is None else bias_V.to(dtype)
    chunk = _chunk_function(compile)
    ce, z = x_TD.new_zeros((), dtype=wide), x_TD.new_zeros((), dtype=wide)
    grad_TD = torch.empty_like(x_TD) if wanted.x else None
    grad_VD = torch.empty_like(weight_VD, dtype=wide) if wanted.weight else None
    grad_V = torch.zeros_like(bias_V, dtype=wide) if wanted.bias and bias_V is not None else None
    for start in range(0, x_TD.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        x_PD = x_TD[rows].to(dtype)
        ce_part, z_part, dlogits_PV = chunk(x_PD, cast_VD, cast_bias_V, targets_T[rows], form, any(wanted))
        ce, z = ce + ce_part, z + z_part
        if grad_TD is not None:
            grad_TD[rows] = _times_matrix(dlogits_PV, cast_VD)
        if grad_VD is not None:
            _add_outer(grad_VD, dlogits_PV, x_PD, first=start == 0)
        if grad_V is not None:
            grad_V += dlogits_PV.sum(0, dtype=wide)
    if grad_VD is not None:
        grad_VD = grad_VD.to(weight_VD.dtype) if x_TD.shape[0] else torch.zeros_like(weight_VD)
    grad_V = None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype)
    return CrossEntropySums(ce + form.z_loss_coef * z, ce, z), (grad_TD, grad_VD, grad_V)


IDS_AT_ONCE = 8192
"""Rows of W in one matrix product of the backward pass on a CPU: products over a large vocabulary are slower."""


def _stretches(num_rows: int, device: torch.device) -> Iterator[slice]:
    """The vocabulary in pieces for matrix products; in one piece on accelerators."""
    size = IDS_AT_ONCE if device.type == "cpu" else max(1, num_rows)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _times_matrix(dlogits_PV: Tensor, weight_VD: Tensor) -> Tensor:
    """``dlogits W``, [P, D], the pieces of the vocabulary added up in fp32 at least."""
    first, *others = _stretches(weight_VD.shape[0], weight_VD.device)
    total_PD = dlogits_PV[:, first] @ weight_VD[first]
    total_PD = total_PD.to(torch.promote_types(total_PD.dtype, torch.float32))
    for ids in others:
        total_PD += dlogits_PV[:, ids] @ weight_VD[ids]
    return total_PD


def _add_outer(total_VD: Tensor, dlogits_PV: Tensor, x_PD: Tensor, *, first: bool) -> None:
    """``total += dlogitsᵀ x``, or ``=`` for the first chunk, so that the usual single chunk adds nothing up."""
    for ids in _stretches(total_VD.shape[0], total_VD.device):
        columns_PV = dlogits_PV[:, ids]
        if x_PD.dtype == total_VD.dtype:
            total_VD[ids].addmm_(columns_PV.T, x_PD, beta=0 if first else 1)
        elif first:
            total_VD[ids] = columns_PV.T @ x_PD
        else:
            total_VD[ids] += columns_PV.T @ x_PD


def _chunk(
    x_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_P: Tensor, form: HeadLoss, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums ce and z of some rows, and the gradient of their loss by the logits before the soft-cap [P, V padded]
    (without ``with_grad`` just an empty tensor).

    Works in place on two fp32 buffers the size of the logits (three with a soft-cap), the gradient comes in x's dtype.
    """
    logits_PV = F.linear(x_PD, weight_VD, bias_V)
    logits_PV = logits_PV.to(torch.promote_types(x_PD.dtype, torch.float32))
    if form.softcap is not None:
        logits_PV = logits_PV.div_(form.softcap).tanh_().mul_(form.softcap)
    if form.vocab_size < logits_PV.shape[1]:
        logits_PV[:, form.vocab_size :] = -math.inf
    lse_P = logits_PV.logsumexp(-1)
    counts_P = (targets_P != form.ignore_index).to(lse_P.dtype)
    ids_P1 = targets_P.masked_fill(targets_P == form.ignore_index, 0)[:, None]
    ce = ((lse_P - logits_PV.gather(1, ids_P1)[:, 0]) * counts_P).sum()
    z = (lse_P.square() * counts_P).sum()
    if not with_grad:
        return ce, z, ce.new_empty(0)
    slope_PV = None if form.softcap is None else 1.0 - (logits_PV / form.softcap).square_()
    grad_PV = logits_PV.sub_(lse_P[:, None]).exp_()  # the softmax
    grad_PV.mul_((counts_P * (1.0 + 2.0 * form.z_loss_coef * lse_P))[:, None])
    if torch.compiler.is_compiling():  # one loop with the rest; a scatter would need the whole buffer in memory first
        grad_PV = grad_PV - counts_P[:, None] * (torch.arange(grad_PV.shape[1], device=grad_PV.device) == ids_P1)
    else:
        grad_PV.scatter_add_(1, ids_P1, -counts_P[:, None])
    if slope_PV is not None:
        grad_PV.mul_(slope_PV)
        grad_PV[:, form.vocab_size :] = 0.0  # 0 · ∞ of the padding
    return ce, z, grad_PV.to(x_PD.dtype)


@cache
def _chunk_function(compile: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_chunk, dynamic=False) if compile else _chunk
