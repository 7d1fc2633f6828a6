"""ALiBi's slopes, as the paper lists them, and what they do to scores."""

from __future__ import annotations

import pytest
import torch

from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.positions.alibi import alibi_slopes
from graft.positions.alibi_config import AlibiConfig

CPU = torch.device("cpu")


def test_slopes_of_8_and_16_heads_are_the_papers():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(16) == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])


def test_slopes_of_12_heads_add_every_other_one_of_16():
    assert alibi_slopes(12) == pytest.approx([*alibi_slopes(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 7, 24])
def test_every_head_has_its_own_slope(num_heads):
    slopes = alibi_slopes(num_heads)
    assert len(set(slopes)) == num_heads
    assert all(0 < s < 1 for s in slopes)


def test_probability_falls_by_the_slope_per_step():
    """All q·k are 0: log-probabilities are −slope · distance plus a constant of the row."""
    T, N = 6, 4
    position = AlibiConfig().build(N, 8)
    x = torch.randn(1, T, N, 8)
    assert torch.equal(position.encode(x, ()), x)
    v = torch.eye(T).view(1, T, 1, T).expand(1, T, N, T)
    zero = torch.zeros(1, T, N, T)
    p_TNS = attention(zero, zero, v, Visibility(causal=True), Scoring(1.0, slopes_N=position.slopes(CPU)))[0]
    steps = p_TNS[-1].log().diff(dim=-1)
    torch.testing.assert_close(steps, torch.tensor(alibi_slopes(N))[:, None].expand(N, T - 1))
