"""A memory whose weights learn while they read, chunk by chunk (Titans, arXiv 2501.00663, equations 8-18).

A head's memory is a map f(M; x) of L layers, ``x → x W_1``, then ``→ silu(·) W_l``. Token t of a document, whose chunk
began with the weights M_c, changes them by the gradient of ``ℓ_t(M) = ‖f(M; k_t) − v_t‖²``::

    S_t = η_t S_{t−1} − θ_t ∇ℓ_t(M_c)      M_t = (1 − α_t) M_{t−1} + S_t      y_t = f(M_t; q_t)

∇ is taken at given k_t and v_t, wherever those come from. Chunks of C tokens count from the document's first, at which
M is the learned start and S zero; padding changes nothing.

The gradient of layer l is ``a δᵀ`` (a what the layer reads, δ what comes back), so that all M_t of a chunk are the
weights before it, the momentum before it, and weighted sums of such products: with [C, C] tables of weights every layer
is read like linear attention and no M_t is ever made, save the last. A chunk of a *row* is cut at fixed columns, so it
may hold the end of one chunk of a document, the beginning of its next, and further documents; see `advance`.

Letters: N heads, C columns, a layer's weights [B, N, in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.autocast import full_precision

Weights = tuple[Tensor, ...]
"""One tensor [B or 1, N, in, out] per layer."""


class Memory(NamedTuple):
    """Where a memory stands: weights M, momentum S, and the weights with which the chunk under way began."""

    weights: Weights
    momentum: Weights
    base: Weights


class Base(NamedTuple):
    """Weights, and the columns that use them.

    Args:
        weights: one tensor per layer.
        mask_BC: bool; None = every column.
    """

    weights: Weights
    mask_BC: Tensor | None


Bases = tuple[Base, ...]
"""Weights of several columns; exactly one mask is true at each."""


class Writing(NamedTuple):
    """What the columns do to the memory and ask of it; everything in fp32 or wider.

    Args:
        q_BNCH: queries.
        k_BNCH: keys.
        v_BNCH: values.
        step_BNC: θ.
        log_momentum_BNC: log η, finite and at most 0.
        log_keep_BNC: log (1 − α), finite and at most 0.
    """

    q_BNCH: Tensor
    k_BNCH: Tensor
    v_BNCH: Tensor
    step_BNC: Tensor
    log_momentum_BNC: Tensor
    log_keep_BNC: Tensor


class Columns(NamedTuple):
    """The documents of a few columns.

    Args:
        real_BC: False at padding.
        run_BC: how many documents have begun among these columns; 0 = the one under way before (padding: as before it).
        begins_BC: a chunk of a document begins, other than its first.
    """

    real_BC: Tensor
    run_BC: Tensor
    begins_BC: Tensor


Propose = Callable[[Bases], Writing]
"""What the columns write, given the weights with which each one's chunk began. May be asked twice: the last counts."""


class Surprise(NamedTuple):
    """The gradients of a chunk, as factors: per layer what it reads and what comes back, each [B, N, C, ·]."""

    inputs: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]


class Shares(NamedTuple):
    """What the weights M_t and the momentum S_t at column t are made of.

    Args:
        start_BNC: share in M_t of the weights before the chunk, or of the learned start once a document begins.
        momentum_BNC: share in M_t of the momentum before the chunk.
        gradient_BNCC: share in M_t of the gradient of column s.
        momentum_in_momentum_BNC: share in S_t of the momentum before the chunk.
        gradient_in_momentum_BNCC: share in S_t of the gradient of column s.
    """

    start_BNC: Tensor
    momentum_BNC: Tensor
    gradient_BNCC: Tensor
    momentum_in_momentum_BNC: Tensor
    gradient_in_momentum_BNCC: Tensor


def evaluate(bases: Bases, x_BNCH: Tensor) -> Tensor:
    """f(M; x) at every column, M being the weights its base names.

    Weights that change a little at every token are kept and multiplied in fp32 or wider, whatever autocast says.
    """
    with full_precision(x_BNCH.device):
        return _forward(bases, x_BNCH)[0]


def surprise(bases: Bases, k_BNCH: Tensor, v_BNCH: Tensor, most: float | None = None) -> Surprise:
    """The gradient of ``‖f(M; k) − v‖²`` at every column, by the chain rule, shortened to a length of ``most``."""
    y, inputs, before = _forward(bases, k_BNCH)
    deltas = [2.0 * (y - v_BNCH)]
    for layer in range(len(inputs) - 1, 0, -1):
        back = _through(bases, layer, deltas[0], transpose=True)
        gate = before[layer - 1].sigmoid()
        deltas.insert(0, back * gate * (1.0 + before[layer - 1] * (1.0 - gate)))
    if most is not None:
        squares = (a.square().sum(-1) * d.square().sum(-1) for a, d in zip(inputs, deltas, strict=True))
        shorter = shortening(sum(squares, start=torch.zeros_like(y[..., 0])), most)[..., None]
        deltas = [delta * shorter for delta in deltas]
    return Surprise(tuple(inputs), tuple(deltas))


def shortening(squares: Tensor, most: float) -> Tensor:
    """The factor that takes a gradient of this squared length to a length of at most ``most``."""
    return most / squares.clamp_min(most**2).sqrt()


def _forward(bases: Bases, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The result, what each layer reads, and what each layer but the last gives before its activation."""
    inputs, before = [x], [_through(bases, 0, x)]
    for layer in range(1, len(bases[0].weights)):
        inputs.append(F.silu(before[-1]))
        before.append(_through(bases, layer, inputs[-1]))
    return before[-1], inputs, before[:-1]


def _through(bases: Bases, layer: int, x: Tensor, *, transpose: bool = False) -> Tensor:
    """x times the layer's weights (or their transposes), column by column those of its base."""
    total: Tensor | None = None
    for base in bases:
        weight = base.weights[layer]
        y = x @ (weight.transpose(-1, -2) if transpose else weight)
        if base.mask_BC is not None:
            y = torch.where(base.mask_BC[:, None, :, None], y, 0.0)
        total = y if total is None else total + y
    assert total is not None
    return total


def advance(
    propose: Propose, memory: Memory, start: Weights, columns: Columns | None, max_surprise: float | None = None
) -> tuple[Tensor, Memory]:
    """What up to C columns read, and the memory after them.

    Without ``columns`` a chunk of a document begins at the first column and all are real. Otherwise at most one chunk
    that is not its document's first can begin among C columns, and if so in the document under way: what it begins with
    follows from the columns before it. So the columns are gone through twice, first for those before that border, then
    for all; documents that begin among the columns begin with the known start.

    Args:
        propose: what the columns write.
        memory: before them.
        start: the learned start, one tensor [1, N, in, out] per layer.
        columns: where documents and chunks begin.
        max_surprise: the greatest length of a column's gradient, over all layers; longer ones are shortened to it.

    Returns:
        [B, N, C, H], and the memory after the last column.
    """
    if columns is None:
        writing, bases = _asked(propose, (Base(memory.weights, None),))
        with full_precision(writing.k_BNCH.device):
            return _read_and_move(writing, bases, memory, start, None, max_surprise)
    old_BC, fresh_BC = columns.run_BC == 0, columns.run_BC > 0
    writing, bases = _asked(propose, (Base(memory.base, old_BC), Base(start, fresh_BC)))
    with full_precision(writing.k_BNCH.device):
        shares = _shares(writing, columns)
        found = surprise(bases, writing.k_BNCH, writing.v_BNCH, max_surprise)
        border = _weights_before(columns.begins_BC, shares, found, memory)
    new_BC = (columns.begins_BC.cumsum(1) > 0) & old_BC
    writing, bases = _asked(propose, (Base(memory.base, old_BC & ~new_BC), Base(border, new_BC), Base(start, fresh_BC)))
    with full_precision(writing.k_BNCH.device):
        return _read_and_move(writing, bases, memory, start, columns, max_surprise)


def _asked(propose: Propose, bases: Bases) -> tuple[Writing, Bases]:
    return propose(bases), bases


def _shares(writing: Writing, columns: Columns | None) -> Shares:
    """The recurrences of S and M over a chunk, unrolled: products of factors are differences of sums of logarithms."""
    log_momentum, log_keep, step = writing.log_momentum_BNC, writing.log_keep_BNC, writing.step_BNC
    C = step.shape[-1]
    joined = torch.ones((C, C), dtype=torch.bool, device=step.device).tril()[None, None]
    if columns is not None:
        real = columns.real_BC[:, None]
        log_momentum, log_keep, step = (torch.where(real, x, 0.0) for x in (log_momentum, log_keep, step))
        joined = joined & (columns.run_BC[:, None, :, None] == columns.run_BC[:, None, None, :])
    momentum_sum, keep_sum = log_momentum.cumsum(-1), log_keep.cumsum(-1)
    fading, keeping = (
        (x[..., :, None] - x[..., None, :]).masked_fill(~joined, float("-inf")).exp() for x in (momentum_sum, keep_sum)
    )
    start, carried = keep_sum.exp(), momentum_sum.exp()
    if columns is not None:
        # padding adds no momentum to the weights
        keeping = torch.where(columns.real_BC[:, None, None, :], keeping, 0.0)
        start = (keep_sum - _sum_before(keep_sum, columns.run_BC)).exp()
        carried = torch.where((columns.run_BC == 0)[:, None], carried, 0.0)
    in_momentum = -fading * step[..., None, :]
    momentum = (keeping * carried[..., None, :]).sum(-1)
    return Shares(start, momentum, keeping @ in_momentum, carried, in_momentum)


def _sum_before(sum_BNC: Tensor, run_BC: Tensor) -> Tensor:
    """The running sum just before the first column of each column's document."""
    ahead_BC = torch.cat((torch.zeros_like(run_BC[:, :1]), run_BC[:, :-1]), dim=1)
    places_C = torch.arange(run_BC.shape[1], device=run_BC.device)
    first_BC = torch.where(run_BC != ahead_BC, places_C, 0).cummax(dim=1).values
    shifted = F.pad(sum_BNC[..., :-1], (1, 0))
    return shifted.gather(-1, first_BC[:, None].expand_as(sum_BNC))


def _read_and_move(
    writing: Writing, bases: Bases, memory: Memory, start: Weights, columns: Columns | None, max_surprise: float | None
) -> tuple[Tensor, Memory]:
    """What the columns read with their own M_t, and M, S and the chunk's beginning after the last of them."""
    shares = _shares(writing, columns)
    found = surprise(bases, writing.k_BNCH, writing.v_BNCH, max_surprise)
    fresh_BC = None if columns is None else columns.run_BC > 0
    x = writing.q_BNCH
    for layer, (a, delta) in enumerate(zip(*found, strict=True)):
        x = F.silu(x) if layer else x
        old = x @ memory.weights[layer]
        if fresh_BC is not None:
            old = torch.where(fresh_BC[:, None, :, None], x @ start[layer], old)
        carried = x @ memory.momentum[layer]
        near = (x @ a.transpose(-1, -2) * shares.gradient_BNCC) @ delta
        x = shares.start_BNC[..., None] * old + shares.momentum_BNC[..., None] * carried + near
    fresh_B = None if fresh_BC is None else fresh_BC[:, -1]
    weights = _made_of(
        shares.start_BNC[..., -1], shares.momentum_BNC[..., -1], shares.gradient_BNCC[..., -1, :], found,
        _either(fresh_B, start, memory.weights), memory.momentum,
    )  # fmt: skip
    momentum = _made_of(
        None, shares.momentum_in_momentum_BNC[..., -1], shares.gradient_in_momentum_BNCC[..., -1, :], found,
        None, memory.momentum,
    )  # fmt: skip
    return x, Memory(weights, momentum, _last_base(bases))


def _made_of(
    old_BN: Tensor | None, momentum_BN: Tensor, gradient_BNC: Tensor, found: Surprise, weights: Weights | None,
    momentum: Weights,
) -> Weights:  # fmt: skip
    """``old · weights + momentum · S + Σ_s gradient_s a_s δ_sᵀ`` for every layer."""
    made: list[Tensor] = []
    for layer, (a, delta) in enumerate(zip(*found, strict=True)):
        total = (a * gradient_BNC[..., None]).transpose(-1, -2) @ delta
        total = total + momentum_BN[..., None, None] * momentum[layer]
        if old_BN is not None and weights is not None:
            total = total + old_BN[..., None, None] * weights[layer]
        made.append(total)
    return tuple(made)


def _weights_before(begins_BC: Tensor, shares: Shares, found: Surprise, memory: Memory) -> Weights:
    """M just before the column where a chunk begins; rows without one give weights that nothing uses."""
    border_B = begins_BC.int().argmax(1)
    row_B11 = (border_B - 1).clamp_min(0)[:, None, None]
    inside_B1 = (border_B > 0)[:, None]
    N, C = shares.start_BNC.shape[1:]
    start_BN, momentum_BN = (
        x.gather(-1, row_B11.expand(-1, N, 1))[..., 0] for x in (shares.start_BNC, shares.momentum_BNC)
    )
    gradient_BNC = shares.gradient_BNCC.gather(2, row_B11[..., None].expand(-1, N, 1, C))[:, :, 0]
    return _made_of(
        torch.where(inside_B1, start_BN, 1.0),
        torch.where(inside_B1, momentum_BN, 0.0),
        torch.where(inside_B1[..., None], gradient_BNC, 0.0),
        found,
        memory.weights,
        memory.momentum,
    )


def _last_base(bases: Bases) -> Weights:
    """The weights with which the chunk of the last column began."""
    chosen = bases[0].weights
    for base in bases[1:]:
        assert base.mask_BC is not None
        chosen = _either(base.mask_BC[:, -1], base.weights, chosen)
    return chosen


def _either(choice_B: Tensor | None, yes: Sequence[Tensor], no: Sequence[Tensor]) -> Weights:
    """Row by row one of two sets of weights; without a choice the second."""
    if choice_B is None:
        return tuple(no)
    return tuple(torch.where(choice_B[:, None, None, None], a, b) for a, b in zip(yes, no, strict=True))
