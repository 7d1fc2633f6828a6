"""Sampling filters against transformers and closed forms; draws against the distribution they must follow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graft.errors import ConfigError
from graft.generation.sampling import (
    SamplingSettings,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    uniforms,
)

NO_IDS = torch.zeros(1, 1, dtype=torch.long)


def random_logits(seed: int, batch: int = 5, vocab: int = 37) -> torch.Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 1000), k=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_top_k_equals_transformers(seed: int, k: int) -> None:
    logits = random_logits(seed)
    torch.testing.assert_close(keep_top_k(logits, k), TopKLogitsWarper(k)(NO_IDS, logits), rtol=0, atol=0)


@given(seed=st.integers(0, 1000), p=st.floats(0.01, 1.0))
@settings(max_examples=30, deadline=None)
def test_top_p_equals_transformers(seed: int, p: float) -> None:
    logits = random_logits(seed).double()
    torch.testing.assert_close(keep_top_p(logits, p), TopPLogitsWarper(p)(NO_IDS, logits), rtol=0, atol=0)


@given(seed=st.integers(0, 1000), p=st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_min_p_equals_transformers(seed: int, p: float) -> None:
    logits = random_logits(seed).double()
    torch.testing.assert_close(keep_min_p(logits, p), MinPLogitsWarper(p)(NO_IDS, logits), rtol=0, atol=0)


@given(seed=st.integers(0, 1000), penalty=st.floats(0.5, 3.0))
@settings(max_examples=30, deadline=None)
def test_repetition_penalty_equals_transformers(seed: int, penalty: float) -> None:
    logits = random_logits(seed)
    ids = torch.randint(0, 37, (5, 11), generator=torch.Generator().manual_seed(seed + 1))
    seen = torch.zeros(5, 37, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected)


def test_repetition_penalty_closed_form() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {p: torch.isfinite(keep_top_p(logits, p)).sum().item() for p in (0.01, 0.49, 0.51, 0.79, 0.81, 1.0)}
    assert kept == {0.01: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 1.0: 4}


def test_top_k_keeps_ties_and_order_of_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert torch.isfinite(keep_top_k(logits, 2)).tolist() == [[False, True, True, True, False]]


def test_draw_inverts_the_distribution_exactly() -> None:
    probs = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25], dtype=torch.float64)
    grid = torch.arange(1000, dtype=torch.float64) / 1000
    drawn = draw(probs.log().expand(1000, -1), grid)
    assert torch.bincount(drawn, minlength=5).tolist() == [250, 0, 500, 0, 250]


def test_draw_never_takes_a_removed_token_at_the_edges() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    almost_one = 1.0 - 2.0**-53
    for u in (0.0, 0.5 - 2.0**-54, 0.5, almost_one):
        assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() in (1, 3)


def test_choose_applies_every_step_in_the_order_of_transformers() -> None:
    logits = random_logits(3, batch=400, vocab=23).double()
    ids = torch.randint(0, 23, (400, 4), generator=torch.Generator().manual_seed(4))
    seen = torch.zeros(400, 23, dtype=torch.bool).scatter(1, ids, True)
    uniform = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    setting = SamplingSettings(temperature=1.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.3)
    warped = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)):
        warped = warper(ids, warped)
    assert choose(logits, setting, uniform, seen).tolist() == draw(warped, uniform).tolist()


def test_draw_frequencies_follow_softmax() -> None:
    count = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = draw(logits.expand(count, -1), uniforms(0, [[1]], count)[0])
    share = torch.bincount(drawn, minlength=4) / count
    expected = logits.softmax(-1)
    # five standard deviations of a binomial share
    bound = 5 * (expected * (1 - expected) / count).sqrt()
    assert bool(((share - expected).abs() < bound).all())


def test_greedy_is_argmax_and_ignores_the_random_numbers() -> None:
    logits = random_logits(7)
    greedy = SamplingSettings(temperature=0.0)
    nothing_seen = torch.zeros(5, 37, dtype=torch.bool)
    for u in (0.0, 0.9):
        assert choose(logits, greedy, torch.full((5,), u), nothing_seen).tolist() == logits.argmax(-1).tolist()


def test_low_temperature_approaches_greedy_and_high_temperature_uniform() -> None:
    logits = random_logits(8, batch=1, vocab=4).expand(4000, -1)
    uniform = uniforms(1, [[3]], 4000)[0]
    nothing_seen = torch.zeros(4000, 4, dtype=torch.bool)
    cold = choose(logits, SamplingSettings(temperature=1e-3), uniform, nothing_seen)
    assert cold.unique().tolist() == [int(logits[0].argmax())]
    hot = torch.bincount(choose(logits, SamplingSettings(temperature=1e6), uniform, nothing_seen), minlength=4) / 4000
    assert hot.sub(0.25).abs().max().item() < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_uniforms_do_not_depend_on_the_batch() -> None:
    alone = uniforms(5, [[1, 2]], 8)[0]
    batch = uniforms(5, [[9], [1, 2], [1, 2], []], 8)
    assert torch.equal(batch[1], alone)
    assert torch.equal(uniforms(5, [[1, 2], [1, 2]], 8)[1], batch[2])
    assert len({tuple(row.tolist()) for row in batch}) == 4
    assert not torch.equal(uniforms(6, [[1, 2]], 8)[0], alone)
    assert torch.equal(uniforms(5, [[1, 2]], 3)[0], alone[:3])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"temperature": 0.0, "top_k": 3}, "do nothing at temperature 0"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingSettings(**bad)  # pyright: ignore[reportArgumentType]
