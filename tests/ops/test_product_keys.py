"""Top-k over product keys: every expert once, exactly the best, gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from graft.ops.product_keys import expert_numbers, product_topk

GRIDS = [(24,), (64, 64), (7, 5), (3, 100), (16, 16, 16), (2, 9, 4), (8, 8, 8, 8), (3, 1, 4, 2)]


def made(dims: tuple[int, ...], rows: int = 6, channels: int = 5) -> tuple[torch.Tensor, list[torch.Tensor]]:
    queries = torch.randn(rows, len(dims), channels, dtype=torch.float64, requires_grad=True)
    return queries, [torch.randn(d, channels, dtype=torch.float64, requires_grad=True) for d in dims]


@pytest.mark.parametrize("dims", GRIDS, ids=str)
def test_numbers_are_a_bijection(dims: tuple[int, ...]) -> None:
    places = [torch.tensor(axis) for axis in zip(*itertools.product(*map(range, dims)), strict=True)]
    assert expert_numbers(places, dims).tolist() == list(range(math.prod(dims)))


@pytest.mark.parametrize("dims", [(24,), (5, 7), (4, 3, 5), (3, 2, 4, 2)], ids=str)
def test_every_expert_is_found_by_its_own_key(dims: tuple[int, ...]) -> None:
    """Orthonormal keys: the query made of an expert's keys finds that expert first."""
    keys = [torch.eye(max(dims))[:d] for d in dims]
    places = [torch.tensor(axis) for axis in zip(*itertools.product(*map(range, dims)), strict=True)]
    queries = torch.stack([key[place] for key, place in zip(keys, places, strict=True)], dim=1)
    for kernels in ("auto", "reference"):
        scores, ids = product_topk(queries, keys, 1, kernels=kernels)
        assert ids[:, 0].tolist() == list(range(math.prod(dims)))
        assert (scores == len(dims)).all()


@pytest.mark.parametrize("dims", GRIDS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4, 16, 24])
def test_equals_brute_force(dims: tuple[int, ...], k: int) -> None:
    queries, keys = made(dims)
    every = torch.zeros(6, *dims, dtype=torch.float64)
    for axis, key in enumerate(keys):
        shape = [6] + [1] * len(dims)
        shape[axis + 1] = dims[axis]
        every = every + torch.einsum("rc,dc->rd", queries[:, axis], key).view(shape)
    expected, order = every.flatten(1).sort(dim=1, descending=True)
    for kernels in ("auto", "reference"):
        scores, ids = product_topk(queries, keys, k, kernels=kernels)
        assert torch.equal(ids, order[:, :k])
        torch.testing.assert_close(scores, expected[:, :k], rtol=0, atol=1e-12)


def test_ties_cost_no_score() -> None:
    """Scores with many equal values, rounded coarsely: whichever experts are taken, their scores are the best."""
    queries = torch.randint(-2, 3, (50, 3, 2)).float()
    keys = [torch.randint(-2, 3, (d, 2)).float() for d in (9, 6, 7)]
    fast, ids = product_topk(queries, keys, 12)
    assert torch.equal(fast, product_topk(queries, keys, 12, kernels="reference")[0])
    assert all(len(set(row)) == 12 for row in ids.tolist())


@pytest.mark.parametrize("dims", [(24,), (7, 5), (3, 4, 5)], ids=str)
def test_gradients_reach_queries_and_keys(dims: tuple[int, ...]) -> None:
    queries, keys = made(dims)
    weights = torch.randn(6, 4, dtype=torch.float64)
    found = {}
    for kernels in ("auto", "reference"):
        scores, _ = product_topk(queries, keys, 4, kernels=kernels)
        found[kernels] = torch.autograd.grad((scores.softmax(-1) * weights).sum(), [queries, *keys])
    for fast, plain in zip(found["auto"], found["reference"], strict=True):
        assert fast.abs().max() > 0
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
