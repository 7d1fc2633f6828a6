"""The neural memory token by token: the definition that `graft.ops.neural_memory_chunk` must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.autocast import full_precision
from graft.ops.neural_memory_chunk import Base, Columns, Memory, Propose, Weights, shortening


def reference_step(
    propose: Propose, memory: Memory, start: Weights, columns: Columns | None, max_surprise: float | None = None
) -> tuple[Tensor, Memory]:
    """`advance` for one column, as the equations say: all weights, the gradient as autograd would give it."""
    assert columns is not None
    assert columns.run_BC.shape[1] == 1, "one column"
    fresh, begins, real = (x[:, 0, None, None, None] for x in (columns.run_BC > 0, columns.begins_BC, columns.real_BC))
    weights = tuple(torch.where(fresh, a, b) for a, b in zip(start, memory.weights, strict=True))
    momentum = tuple(torch.where(fresh, 0.0, x) for x in memory.momentum)
    base = tuple(torch.where(fresh | begins, a, b) for a, b in zip(weights, memory.base, strict=True))
    writing = propose((Base(base, None),))
    with full_precision(writing.k_BNCH.device):
        gradient = _gradient(base, writing.k_BNCH, writing.v_BNCH)
        if max_surprise is not None:
            squares = torch.stack([g.square().sum((-2, -1), keepdim=True) for g in gradient]).sum(0)
            gradient = tuple(g * shortening(squares, max_surprise) for g in gradient)
        step, eta, keep = (
            x[..., None] for x in (writing.step_BNC, writing.log_momentum_BNC.exp(), writing.log_keep_BNC.exp())
        )
        moved = tuple(eta * s - step * g for s, g in zip(momentum, gradient, strict=True))
        momentum = tuple(torch.where(real, a, b) for a, b in zip(moved, momentum, strict=True))
        changed = tuple(keep * w + s for w, s in zip(weights, momentum, strict=True))
        weights = tuple(torch.where(real, a, b) for a, b in zip(changed, weights, strict=True))
        return plain_read(weights, writing.q_BNCH), Memory(weights, momentum, base)


def plain_read(weights: Weights, x: Tensor) -> Tensor:
    """f(M; x) for one M per row and head."""
    for layer, weight in enumerate(weights):
        x = (F.silu(x) if layer else x) @ weight
    return x


def _gradient(weights: Weights, k: Tensor, v: Tensor) -> Weights:
    """∂‖f(M; k) − v‖²/∂M, layer by layer, summed over the columns given."""
    inputs, before = [k], [k @ weights[0]]
    for weight in weights[1:]:
        inputs.append(F.silu(before[-1]))
        before.append(inputs[-1] @ weight)
    delta = 2.0 * (before[-1] - v)
    gradient: list[Tensor] = []
    for layer in range(len(weights) - 1, -1, -1):
        gradient.insert(0, inputs[layer].transpose(-1, -2) @ delta)
        if layer:
            x = before[layer - 1]
            slope = x.sigmoid() + x * x.sigmoid() * (1.0 - x.sigmoid())
            delta = delta @ weights[layer].transpose(-1, -2) * slope
    return tuple(gradient)
