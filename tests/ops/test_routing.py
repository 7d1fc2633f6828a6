"""The choice of experts by brute force; the way to them and back; counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graft.ops.routing import choose, collect, count, scores, sort_slots, spread


def best_subset(suitability: list[float], k: int) -> set[int]:
    """The k experts with the largest sum, by trying them all."""
    subsets = itertools.combinations(range(len(suitability)), k)
    return set(max(subsets, key=lambda chosen: sum(suitability[e] for e in chosen)))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_chooses_the_best(k: int) -> None:
    suitability = torch.randn(20, 6, dtype=torch.float64)
    chosen = choose(suitability, k)
    for row, experts in zip(suitability.tolist(), chosen.tolist(), strict=True):
        assert set(experts) == best_subset(row, k)
        assert experts == sorted(experts, key=lambda e: -row[e])


@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 3), (3, 1, 2), (6, 3, 4)])
def test_groups_by_hand(groups: int, kept: int, k: int) -> None:
    """12 experts; also with scores below zero, which must not lose against experts that are out."""
    suitability = torch.randn(30, 12, dtype=torch.float64) - 2.0
    chosen = choose(suitability, k, num_groups=groups, num_groups_kept=kept)
    size, strict = 12 // groups, 0
    for row, experts in zip(suitability.tolist(), chosen.tolist(), strict=True):
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        worth = [sum(sorted((row[e] for e in group), reverse=True)[:2]) for group in members]
        allowed = [e for g in sorted(range(groups), key=lambda g: -worth[g])[:kept] for e in members[g]]
        assert set(experts) == set(sorted(allowed, key=lambda e: -row[e])[:k])
        strict += set(experts) != best_subset(row, k)
    assert strict, "the groups never mattered"


def test_no_gradient_comes_through_the_choice() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    assert not choose(logits, 2).requires_grad


def test_scores() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    expected = logits.exp() / logits.exp().sum()
    torch.testing.assert_close(scores(logits, "softmax"), expected)
    torch.testing.assert_close(scores(logits, "sigmoid"), 1 / (1 + (-logits).exp()))


def chosen_experts(tokens: int, k: int, num_experts: int) -> Tensor:
    return torch.rand(tokens, num_experts).argsort(-1)[:, :k]


def test_slots_are_sorted_and_find_back() -> None:
    experts = chosen_experts(9, 2, 5)
    slots = sort_slots(experts, 5)
    assert slots.expert_M.tolist() == sorted(experts.flatten().tolist())
    assert torch.equal(slots.expert_M, experts.flatten()[slots.order_M])
    assert torch.equal(slots.order_M[slots.place_M], torch.arange(18))
    ends = [0, *slots.ends_E.tolist()]
    for e, (start, end) in enumerate(itertools.pairwise(ends)):
        assert (slots.expert_M[start:end] == e).all()
        assert end - start == (experts == e).sum()
    tokens = (slots.order_M // 2).tolist()
    for start, end in itertools.pairwise(ends):
        assert tokens[start:end] == sorted(tokens[start:end])


def test_there_and_back_is_the_weighted_sum() -> None:
    """With its gradients, against plain indexing."""
    experts = chosen_experts(7, 3, 4)
    slots = sort_slots(experts, 4)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = collect(spread(x, slots) * factor[slots.expert_M], weights, slots)
    expected = (x[:, None] * factor[experts] * weights[..., None]).sum(1)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, (x, weights, factor), direction),
        torch.autograd.grad(expected, (x, weights, factor), direction),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_sums_of_low_precision_are_wide() -> None:
    slots = sort_slots(chosen_experts(3, 2, 4), 4)
    assert collect(torch.ones(6, 5, dtype=torch.bfloat16), torch.ones(3, 2), slots).dtype == torch.float32


def test_counts_leave_out_what_is_not_real() -> None:
    experts = torch.tensor([[[0, 2], [2, 1], [3, 2]]])
    assert count(experts, 5).tolist() == [1, 1, 3, 1, 0]
    real = torch.tensor([[True, False, True]])
    assert count(experts, 5, real).tolist() == [1, 0, 2, 1, 0]
    assert count(experts, 5, real).dtype == torch.int64
