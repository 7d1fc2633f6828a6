"""Cached generation against the plain definition: the argmax (or draw) of a full forward over everything so far."""

import pytest
import torch

from graft.config.model import ModelConfig
from graft.errors import ConfigError
from graft.generation.engine import Generation, generate, left_pad
from graft.generation.sampling import SamplingSettings, choose, uniforms
from graft.model import Model, build_model

VOCAB = 29
GREEDY = SamplingSettings(temperature=0.0)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [1, 2, 3, 4]]


def tiny_model(position: str = "rope", sliding_window: int | None = None, loops: int = 1) -> Model:
    attention = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "sliding_window": sliding_window}
    attention["position"] = {"type": position}
    config = ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_layers": 2,
            "loops": loops,
            "norm": {"type": "rms_norm"},
            "init": {"std": 0.5},
            "blocks": {"b": [attention, {"type": "mlp", "intermediate_size": 48}]},
        }
    )
    return build_model(config, VOCAB, seed=3)


def by_full_forward(model: Model, prompt: list[int], count: int, settings: SamplingSettings) -> list[int]:
    uniform = uniforms(settings.seed, [prompt], count)
    ids = list(prompt)
    with torch.inference_mode():
        for step in range(count):
            logits = model(torch.tensor([ids]))[:, -1]
            seen = torch.zeros(1, VOCAB, dtype=torch.bool)
            seen[0, ids] = True
            ids.append(int(choose(logits, settings, uniform[:, step], seen)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_cached_greedy_equals_full_forward_in_a_padded_batch(position: str, sliding_window: int | None) -> None:
    model = tiny_model(position, sliding_window)
    results = generate(model, PROMPTS, settings=GREEDY, max_new_tokens=12)
    assert [list(r.token_ids) for r in results] == [by_full_forward(model, p, 12, GREEDY) for p in PROMPTS]
    assert [r.finish for r in results] == ["length"] * 3


def test_equal_prompts_need_no_padding_and_loops_have_their_own_state() -> None:
    model = tiny_model(loops=2)
    prompts = [[1, 2, 3], [7, 8, 9]]
    results = generate(model, prompts, settings=GREEDY, max_new_tokens=9)
    assert [list(r.token_ids) for r in results] == [by_full_forward(model, p, 9, GREEDY) for p in prompts]


def test_samples_with_every_filter_equal_the_definition() -> None:
    model = tiny_model()
    setting = SamplingSettings(temperature=1.5, top_k=12, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=11)
    results = generate(model, PROMPTS, settings=setting, max_new_tokens=15)
    assert [list(r.token_ids) for r in results] == [by_full_forward(model, p, 15, setting) for p in PROMPTS]


def test_a_sequence_does_not_depend_on_its_batch_but_on_the_seed() -> None:
    model = tiny_model()
    setting = SamplingSettings(temperature=2.0, seed=1)
    together = generate(model, [*PROMPTS, PROMPTS[0]], settings=setting, max_new_tokens=10)
    alone = generate(model, [PROMPTS[2]], settings=setting, max_new_tokens=10)
    assert together[2] == alone[0]
    assert together[0].token_ids != together[3].token_ids, "equal prompts are different samples"
    other = generate(model, [PROMPTS[2]], settings=SamplingSettings(temperature=2.0, seed=2), max_new_tokens=10)
    assert other != alone


def test_rows_end_on_their_own() -> None:
    model = tiny_model()
    free = generate(model, PROMPTS, settings=GREEDY, max_new_tokens=12)
    end = free[0].token_ids[3]
    results = generate(model, PROMPTS, settings=GREEDY, max_new_tokens=12, end_ids=[end])
    for result, whole in zip(results, free, strict=True):
        expected = whole.token_ids
        if end in expected:
            expected = expected[: expected.index(end)]
            assert result.finish == "end"
        assert result.token_ids == expected
    assert len(results[0].token_ids) <= 3
    assert end not in results[0].token_ids


def test_on_token_sees_every_token_and_can_end_a_row() -> None:
    model = tiny_model()
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def on_token(row: int, token: int) -> bool:
        seen[row].append(token)
        return row == 1 and len(seen[1]) == 4

    results = generate(model, PROMPTS, settings=GREEDY, max_new_tokens=8, on_token=on_token)
    assert [list(r.token_ids) for r in results] == [seen[0], seen[1], seen[2]]
    assert [len(r.token_ids) for r in results] == [8, 4, 8]
    assert [r.finish for r in results] == ["length", "stop", "length"]


def test_generation_stops_computing_when_every_row_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    calls: list[int] = []
    decode = model.decode

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return decode(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(model, "decode", counted)
    generate(model, PROMPTS, settings=GREEDY, max_new_tokens=50, on_token=lambda row, token: True)
    assert len(calls) == 1
    generate(model, PROMPTS, settings=GREEDY, max_new_tokens=5)
    assert len(calls) == 1 + 5, "a prefill and one step for each further token"


def test_rows_beyond_the_tokenizer_are_never_chosen() -> None:
    model = tiny_model()
    hot = SamplingSettings(temperature=100.0)
    results = generate(model, PROMPTS, settings=hot, max_new_tokens=40, vocab_size=13)
    chosen = {t for r in results for t in r.token_ids}
    assert max(chosen) == 12
    assert max(t for r in generate(model, PROMPTS, settings=hot, max_new_tokens=40) for t in r.token_ids) > 12


def test_the_model_keeps_its_mode_and_its_gradients() -> None:
    model = tiny_model().train()
    generate(model, PROMPTS, settings=GREEDY, max_new_tokens=2)
    assert model.training
    model(torch.tensor([[1, 2]])).sum().backward()
    model.eval()
    generate(model, PROMPTS, settings=GREEDY, max_new_tokens=2)
    assert not model.training


def test_dropout_is_off() -> None:
    config = tiny_model().config
    noisy = config.replace(embedding=config.embedding.replace(dropout=0.9))
    model = build_model(noisy, VOCAB, seed=3).train()
    first = generate(model, PROMPTS, settings=GREEDY, max_new_tokens=8)
    assert first == generate(tiny_model(), PROMPTS, settings=GREEDY, max_new_tokens=8)


def test_low_precision_weights_generate() -> None:
    model = tiny_model().to(torch.bfloat16)
    assert len(generate(model, PROMPTS, settings=GREEDY, max_new_tokens=6)[0].token_ids) == 6


def test_left_padding() -> None:
    ids, segments = left_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert segments is not None
    assert segments.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left_pad([[1, 2], [3, 4]])[1] is None


@pytest.mark.parametrize(
    ("prompts", "count", "words"),
    [
        ([], 1, "no token to continue"),
        ([[1], []], 1, "no token to continue"),
        ([[1, VOCAB]], 1, f"token id {VOCAB}"),
        ([[-1]], 1, "token id -1"),
        ([[1]], 0, "max_new_tokens is 0"),
    ],
)
def test_bad_prompts_are_refused(prompts: list[list[int]], count: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(tiny_model(), prompts, settings=GREEDY, max_new_tokens=count)


def test_learned_positions_limit_the_length() -> None:
    config = tiny_model("none").config
    learned = {"position": {"type": "learned", "max_seq_len": 8}}
    model = build_model(config.replace(embedding=learned), VOCAB, seed=0)
    result = generate(model, [[1, 2, 3], [4]], settings=GREEDY, max_new_tokens=5)[0]
    assert isinstance(result, Generation)
    assert list(result.token_ids) == by_full_forward(model, [1, 2, 3], 5, GREEDY)
    with pytest.raises(ConfigError, match="8 positions"):
        generate(model, [[1, 2, 3], [4]], settings=GREEDY, max_new_tokens=6)


def test_an_encoder_cannot_continue_text() -> None:
    model = build_model(tiny_model().config.replace(bidirectional=True), VOCAB, seed=0)
    with pytest.raises(ConfigError, match="bidirectional"):
        generate(model, PROMPTS, settings=GREEDY, max_new_tokens=1)
