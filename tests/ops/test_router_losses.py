"""The router's losses against the papers' formulas, position by position."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from graft.ops.router_losses import balance_sum, z_sum


def routed(rows: int, length: int, num_experts: int = 6, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.randn(rows, length, num_experts, dtype=torch.float64, requires_grad=True)
    return logits, logits.softmax(-1), logits.topk(k).indices


def test_formula_of_each_row() -> None:
    _, probabilities, experts = (t.detach() for t in routed(3, 7))
    real = torch.rand(3, 7) < 0.6
    real[0], real[1, 0] = False, True  # a row of padding alone
    expected = 0.0
    for b in range(3):
        n = int(real[b].sum())
        for e in range(6):
            if n:
                f = sum(e in experts[b, t].tolist() for t in range(7) if real[b, t]) / n
                p = sum(float(probabilities[b, t, e]) for t in range(7) if real[b, t]) / n
                expected += n * 6 * f * p
    assert float(balance_sum(probabilities, experts, real)) == pytest.approx(expected, rel=1e-12)


def test_even_use_gives_the_number_of_choices() -> None:
    """Every expert chosen alike: num_experts_per_tok per position, whatever the probabilities."""
    experts = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    probabilities = torch.rand(1, 3, 6, dtype=torch.float64).softmax(-1)
    assert float(balance_sum(probabilities, experts, torch.ones(1, 3).bool())) == pytest.approx(3 * 2)


@pytest.mark.parametrize("padding", [0, 3])
def test_one_row_is_transformers_loss(padding: int) -> None:
    logits, probabilities, experts = routed(1, 11)
    real = torch.arange(11)[None] >= padding
    ours = balance_sum(probabilities, experts, real) / real.sum()
    theirs = load_balancing_loss_func((logits[0],), 6, 2, real.long() if padding else None)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs is rounded to fp32
    (mine,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (other,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_rows_add_up() -> None:
    _, probabilities, experts = routed(4, 5)
    real = torch.rand(4, 5) < 0.7
    alone = [balance_sum(probabilities[b : b + 1], experts[b : b + 1], real[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(balance_sum(probabilities, experts, real), torch.stack(alone).sum())


def test_z_sum() -> None:
    logits = routed(2, 5)[0].detach()
    real = torch.rand(2, 5) < 0.7
    real[0, 0] = True
    expected = sum(float(logits[b, t].exp().sum().log() ** 2) for b in range(2) for t in range(5) if real[b, t])
    assert float(z_sum(logits, real)) == pytest.approx(expected, rel=1e-12)
