"""Sliding-window text loss against the plain full forward, brute force, and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from graft.config.model import ModelConfig
from graft.errors import ConfigError, DataError
from graft.evals.perplexity import TextLoss, TokenDocument, text_loss, windows
from graft.model import Model, build_model
from graft.objectives.base import Objective
from graft.objectives.causal_lm_config import CausalLMConfig

VOCAB, END = 31, 30
OBJECTIVE: Objective = CausalLMConfig(z_loss_coef=0.5).build()


def tiny_model() -> Model:
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}, "dropout": 0.5}
    config = ModelConfig.model_validate(
        {
            "hidden_size": 16,
            "num_layers": 2,
            "norm": {"type": "rms_norm"},
            "init": {"std": 0.4},
            "blocks": {"b": [attention, {"type": "mlp", "intermediate_size": 24}]},
        }
    )
    return build_model(config, VOCAB, seed=1, dtype=torch.float64)


def document(length: int, seed: int = 0) -> TokenDocument:
    ids = np.random.default_rng(seed).integers(0, END, length)
    return TokenDocument(ids, num_bytes=2 * length, num_characters=length)


def score(model: Model, documents: list[TokenDocument], context: int, stride: int, batch_size: int = 3) -> TextLoss:
    return text_loss(
        model, OBJECTIVE, documents, end_of_document=END, context=context, stride=stride, batch_size=batch_size
    )


def brute_force(model: Model, doc: TokenDocument, context: int) -> float:
    """Every token from a forward over exactly the ``context`` tokens before it (or all there are)."""
    ids = torch.tensor([END, *doc.token_ids.tolist(), END])
    total = 0.0
    with torch.inference_mode():
        for target in range(1, len(ids)):
            seen = ids[max(0, target - context) : target]
            logits = model.eval()(seen[None])[0, -1].double()
            total += float(cross_entropy(logits, ids[target]))
    return total


def test_a_text_that_fits_equals_one_full_forward() -> None:
    model, doc = tiny_model(), document(20)
    ids = torch.tensor([END, *doc.token_ids.tolist(), END])
    with torch.inference_mode():
        expected = cross_entropy(model.eval()(ids[None, :-1])[0].double(), ids[1:], reduction="sum")
    for context in (21, 50):
        result = score(model, [doc], context, stride=7)
        assert result.num_tokens == 21
        assert result.loss_sum == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("context", [1, 3, 8])
def test_stride_one_equals_brute_force(context: int) -> None:
    model, doc = tiny_model(), document(17)
    assert score(model, [doc], context, stride=1).loss_sum == pytest.approx(brute_force(model, doc, context), rel=1e-6)


def test_larger_strides_are_windows_of_their_own() -> None:
    model, doc = tiny_model(), document(17)
    ids = torch.tensor([END, *doc.token_ids.tolist(), END])
    expected = 0.0
    with torch.inference_mode():
        # context 8, stride 5: written out by hand
        for start, stop, first in ((0, 8, 0), (5, 13, 8), (10, 18, 13)):
            losses = cross_entropy(
                model.eval()(ids[None, start:stop])[0].double(), ids[start + 1 : stop + 1], reduction="none"
            )
            expected += float(losses[first - start :].sum())
    assert score(model, [doc], 8, stride=5).loss_sum == pytest.approx(expected, rel=1e-6)


def test_documents_do_not_see_each_other_whatever_the_batch() -> None:
    model = tiny_model()
    documents = [document(n, seed=n) for n in (3, 25, 1, 9, 9, 14)]
    alone = [score(model, [d], 8, stride=3) for d in documents]
    for batch_size in (1, 2, 7, 100):
        together = score(model, documents, 8, stride=3, batch_size=batch_size)
        assert together.loss_sum == pytest.approx(sum(r.loss_sum for r in alone), rel=1e-6)
        assert together.num_tokens == sum(len(d.token_ids) + 1 for d in documents)
        assert (together.num_documents, together.num_bytes, together.num_characters) == (6, 122, 61)


@given(st.integers(1, 200), st.integers(1, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_score_every_position_once_with_enough_before_it(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for window in windows(length, context, stride):
        assert 0 <= window.start <= window.first_scored < window.stop <= length
        assert window.stop - window.start <= context
        if window.start > 0:
            assert window.first_scored - window.start >= context - stride
        scored += range(window.first_scored, window.stop)
    assert scored == list(range(length))


def test_numbers_of_a_uniform_model() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight().zero_()
    result = score(model, [document(9)], 4, stride=2)
    assert result.loss == pytest.approx(math.log(VOCAB))
    assert result.perplexity == pytest.approx(VOCAB)
    # ten predictions (nine tokens and the end) spread over 18 bytes and 9 characters
    assert result.bits_per_byte == pytest.approx(10 * math.log2(VOCAB) / 18)
    assert result.bits_per_character == pytest.approx(10 * math.log2(VOCAB) / 9)
    assert result.to_dict()["tokens"] == 10


def test_memory_is_bounded_by_the_batch_and_the_text_is_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    shapes: list[torch.Size] = []
    taken: list[int] = []
    features = model.features

    def watched(input_ids_BT: torch.Tensor, **kwargs: object) -> object:
        shapes.append(input_ids_BT.shape)
        return features(input_ids_BT, **kwargs)  # pyright: ignore[reportArgumentType]

    def stream() -> object:
        for i in range(200):
            if i == 150:
                taken.append(len(shapes))
            yield document(10, seed=i)

    monkeypatch.setattr(model, "features", watched)
    score(model, stream(), 8, stride=4, batch_size=2)  # pyright: ignore[reportArgumentType]
    assert max(s.numel() for s in shapes) <= 2 * 8
    assert taken[0] > 0, "scoring starts before the last document is read"


def test_the_mode_of_the_model_stays_and_dropout_is_off() -> None:
    model = tiny_model().train()
    first = score(model, [document(12)], 8, stride=4)
    assert model.training
    assert score(model, [document(12)], 8, stride=4) == first


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_model()
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"stride {stride} with context 8"):
            score(model, [document(3)], 8, stride)
    with pytest.raises(DataError, match="no text to score"):
        score(model, [], 8, 4)
    with pytest.raises(DataError, match="no text to score"):
        score(model, [document(0)], 8, 4)
