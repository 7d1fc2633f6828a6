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
from typing import Literal

import torch
from torch import Tensor


def product_topk(
    queries_RAC: Tensor, keys: Sequence[Tensor], k: int, *, kernels: Literal["auto", "reference"] = "auto"
) -> tuple[Tensor, Tensor]:
    """The k best experts of each query, exactly.

    Args:
        queries_RAC: R queries, a part of C channels for each of A axes.
        keys: one [D_a, C] per axis.
        k: experts per query, at most ΠD.
        kernels: "reference" scores every expert.

    Returns:
        scores [R, k] in falling order, differentiable in queries and keys, and expert numbers [R, k], int64.
    """
    scores = [queries_RAC[:, axis] @ key_DC.T for axis, key_DC in enumerate(keys)]
    if kernels == "reference":
        return _all_sums(scores).topk(k, dim=1)
    with torch.no_grad():
        places = _best_places(scores, k)
    chosen = [axis_scores.gather(1, place) for axis_scores, place in zip(scores, places, strict=True)]
    return _sum(chosen), expert_numbers(places, [key_DC.shape[0] for key_DC in keys])


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


def _sum(terms: Sequence[Tensor]) -> Tensor:
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
