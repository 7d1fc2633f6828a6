"""Maps moved from keys to queries, and from values to outputs: the same scores and the same means."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.ops.absorbed import absorb, absorbed_flops, expand

N, H, W = 3, 4, 7


@pytest.mark.parametrize("ranks", [(), (5,), (5, 2)])
def test_scores_and_means_are_those_of_the_mapped_rows(ranks: tuple[int, ...]) -> None:
    shape = (W, *ranks, N * H)
    factors = [torch.randn(a, b, dtype=torch.float64) for a, b in itertools.pairwise(shape)]
    rows, q = torch.randn(6, W, dtype=torch.float64), torch.randn(2, 5, N, H, dtype=torch.float64)
    mapped = torch.linalg.multi_dot([rows, *factors]) if ranks else rows @ factors[0]
    mapped_MNH = mapped.unflatten(1, (N, H))
    absorbed = absorb(q, factors)
    scores = torch.einsum("btnh,mnh->btnm", q, mapped_MNH)
    torch.testing.assert_close(absorbed @ rows.T, scores, rtol=1e-10, atol=1e-10)
    p = scores.softmax(-1)
    means = torch.einsum("btnm,mnh->btnh", p, mapped_MNH)
    torch.testing.assert_close(expand(p @ rows, factors), means, rtol=1e-10, atol=1e-10)
    with FlopCounterMode(display=False) as counter:
        absorb(q, factors)
    assert counter.get_total_flops() == 2 * 5 * absorbed_flops(factors, N)
