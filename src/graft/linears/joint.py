"""Several linear maps of one input, as one matrix product where that is faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graft.linears.dense import Dense
from graft.ops.autocast import matmul_operand


def joint_linear(x: Tensor, maps: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """``map(x)`` of each of ``maps``, in order: x ``[..., in] -> [..., out of the map]``.

    Plain maps (`Dense`, all with a bias or all without) become one product with the matrices on top of each other when
    the caller is being compiled: fewer and larger products, and one gradient of x instead of a sum of several. Putting
    the matrices together costs nothing there, since it is done by the same loop that rounds them to autocast's dtype:
    rounded first, put together after (the other way round takes two loops). Any other kind of map is called by itself,
    and so is everything outside a compiled training graph.
    """
    weights: list[Tensor] = [m.weight for m in maps if type(m) is Dense]
    biases: list[Tensor] = [m.bias for m in maps if type(m) is Dense and m.bias is not None]
    alike = len(weights) == len(maps) and len(biases) in (0, len(maps))
    if not alike or not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(m(x) for m in maps)
    weight = torch.cat([matmul_operand(w) for w in weights])
    bias = torch.cat([matmul_operand(b) for b in biases]) if biases else None
    return nn.functional.linear(x, weight, bias).split([w.shape[0] for w in weights], dim=-1)
