"""The best of very many keys that are sums of few: top-k over product keys (1907.05242, section 3.1).

Expert ``(i_1, …, i_A)`` of a grid with D_1 × … × D_A places has the score ``Σ_a q_a · key_a[i_a]`` and the number
``Σ_a i_a · Π_{b > a} D_b``: a bijection between places and 0 … ΠD − 1.

**Why few candidates are enough.** Call the sum over the first axes a prefix. A prefix of one of the k best tuples is
one of the k best prefixes: otherwise k prefixes score at least as well, and each of them, continued the same way,
makes a tuple that scores at least as well (adding the same number keeps the order, also in floating point). So k
prefixes are kept after each axis, and of the next axis the k best entries. Of two lists in falling order, the pair
(i, j) of ranks from 1 is no better than all i·j pairs of ranks up to (i, j); pairs with i·j > k are never needed, which
leaves about k·ln k sums instead of k².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.ops.autocast import full_precision
from graft.ops.kernels import Kernels
from graft.ops.outside_graphs import outside_graphs


def product_topk(
    queries_RAC: Tensor, keys: Sequence[Tensor], k: int, *, kernels: Kernels = "auto"
) -> tuple[Tensor, Tensor]:
    """The k best experts of each query, exactly.

    Args:
        queries_RAC: R queries, a part of C channels for each of A axes; scores have their precision, autocast or not.
        keys: one [D_a, C] per axis.
        k: experts per query, at most ΠD.
        kernels: "reference" scores every expert.

    Returns:
        scores [R, k] in falling order, differentiable in queries and keys, and expert numbers [R, k], int64.
    """
    best = reference if kernels == "reference" else outside_graphs(_product_topk)
    return best(queries_RAC, keys, k)


def reference(queries_RAC: Tensor, keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """`product_topk` by scoring every expert."""
    with full_precision(queries_RAC.device):
        scores = [queries_RAC[:, axis] @ key_DC.T for axis, key_DC in enumerate(keys)]
    return _all_sums(scores).topk(k, dim=1)


def _product_topk(queries_RAC: Tensor, keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    queries = [q_RC.contiguous() for q_RC in queries_RAC.unbind(1)]
    with torch.no_grad(), full_precision(queries_RAC.device):
        scores = [q_RC @ key_DC.T for q_RC, key_DC in zip(queries, keys, strict=True)]
        places = _best_places(scores, k)
        chosen = [axis_scores.gather(1, place) for axis_scores, place in zip(scores, places, strict=True)]
    learned = [_Chosen.apply(*given) for given in zip(queries, keys, chosen, places, strict=True)]
    return _sum(learned), expert_numbers(places, [key_DC.shape[0] for key_DC in keys])


class _Chosen(torch.autograd.Function):
    """``q[r] · key[place[r, j]]``, known already, as a function of queries and keys.

    The gradient of all scores of an axis is zero but at the k chosen places of a query: its products with keys and
    queries are sums over those, k of D terms, and it is never made.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q_RC: Tensor, key_DC: Tensor, chosen_RK: Tensor, place_RK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q_RC, key_DC, place_RK)
        return chosen_RK.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dchosen_RK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_RC, key_DC, place_RK = ctx.saved_tensors
        dq_RC = F.embedding_bag(place_RK, key_DC, mode="sum", per_sample_weights=dchosen_RK)
        place_n, order = place_RK.flatten().sort(stable=True)
        starts_D = torch.searchsorted(place_n, torch.arange(len(key_DC), device=place_n.device))
        row_n = order // place_RK.shape[1]
        dkey_DC = F.embedding_bag(row_n, q_RC, starts_D, mode="sum", per_sample_weights=dchosen_RK.flatten()[order])
        return dq_RC, dkey_DC, None, None


def expert_numbers(places: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Numbers of the experts at ``places`` (one index tensor per axis) of a grid with sides ``dims``."""
    numbers = places[0]
    for place, dim in zip(places[1:], dims[1:], strict=True):
        numbers = numbers * dim + place
    return numbers


def _all_sums(scores: Sequence[Tensor]) -> Tensor:
    """[R, ΠD]: the score of every expert, in the order of their numbers."""
    sums = scores[0]
    for axis_scores in scores[1:]:
        sums = (sums[:, :, None] + axis_scores[:, None, :]).flatten(1)
    return sums


def _sum(terms: Sequence[Any]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _best_places(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """One index tensor [R, k] per axis: where the k best tuples are, the best first."""
    totals, place = scores[0].topk(min(k, scores[0].shape[1]), dim=1)
    places = [place]
    for axis_scores in scores[1:]:
        best, place = axis_scores.topk(min(k, axis_scores.shape[1]), dim=1)
        first, second = _useful_pairs(totals.shape[1], best.shape[1], k, totals.device)
        totals, pair = (totals[:, first] + best[:, second]).topk(min(k, totals.shape[1] * best.shape[1]), dim=1)
        places = [p.gather(1, first[pair]) for p in places] + [place.gather(1, second[pair])]
    return places


def _useful_pairs(first: int, second: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices (i, j) into two lists in falling order whose sum may be among the k best: (i + 1)·(j + 1) ≤ k."""
    pairs = [(i, j) for i in range(first) for j in range(min(second, k // (i + 1)))]
    i, j = torch.tensor(pairs, device=device).unbind(1)
    return i, j
