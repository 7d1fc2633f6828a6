"""Linear maps of keys and values moved over to queries and outputs: cheaper where queries are few and keys are many.

With keys ``K = X F₁ … Fₖ`` the scores ``q Kᵀ`` are ``(q Fₖᵀ … F₁ᵀ) Xᵀ``: the queries are mapped, and the rows X serve
all heads as they are. The same way ``p V`` is ``(p X) F₁ … Fₖ``. Multi-head latent attention does it (2405.04434).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.shapes import Float


def absorb(q: Float[Tensor, "*batch N H"], factors: Sequence[Tensor]) -> Float[Tensor, "*batch N W"]:
    """Queries that score rows X as ``q`` scores ``X F₁ … Fₖ``.

    Args:
        q: queries.
        factors: F₁ … Fₖ; F₁ has W rows, the last one N · H columns, split by head.
    """
    *shared, last = factors
    q = torch.einsum("...nh,rnh->...nr", q, last.unflatten(1, q.shape[-2:]))
    for factor in reversed(shared):
        q = q @ factor.T
    return q


def expand(read: Float[Tensor, "*batch N W"], factors: Sequence[Tensor]) -> Float[Tensor, "*batch N H"]:
    """What is read of rows X, a mean per head, as the mean of ``X F₁ … Fₖ``; factors as in `absorb`."""
    *shared, last = factors
    for factor in shared:
        read = read @ factor
    return torch.einsum("...nr,rnh->...nh", read, last.unflatten(1, (read.shape[-2], -1)))


def absorbed_flops(factors: Sequence[Tensor], num_heads: int) -> int:
    """Matrix-product FLOPs of `absorb`, or of `expand`, for one position."""
    *shared, last = factors
    return 2 * last.numel() + 2 * num_heads * sum(factor.numel() for factor in shared)
