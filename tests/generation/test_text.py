"""Text generation with a real tokenizer: prompts, ends, stop strings, streamed text."""

import pytest
import torch

from graft.config.model import ModelConfig
from graft.data.tokenizers.bytes import BytesTokenizer
from graft.data.tokenizers.bytes_config import BytesTokenizerConfig
from graft.errors import ConfigError
from graft.generation.engine import Generation
from graft.generation.sampling import SamplingSettings
from graft.generation.text import generate_text
from graft.model import Model, build_model

GREEDY = SamplingSettings(temperature=0.0)
TOKENIZER = BytesTokenizer(BytesTokenizerConfig())


def reciting_model(text: str, rows: int = 257) -> Model:
    """A model that recites ``text`` by position: learned positions alone decide the logits."""
    ids = [*TOKENIZER.encode(text), TOKENIZER.end_of_document]
    length = len(ids) + 60
    config = ModelConfig.model_validate(
        {
            "hidden_size": length,
            "num_layers": 1,
            "norm": {"type": "rms_norm"},
            "final_norm": False,
            "embedding": {"position": {"type": "learned", "max_seq_len": length}},
            "head": {"tie_word_embeddings": False},
            "blocks": {"b": [{"type": "mlp", "intermediate_size": 1}]},
        }
    )
    model = build_model(config, rows, seed=0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        table = next(p for p in parameters.values() if p.shape == (length, length))
        table.copy_(torch.eye(length))
        head = model.head_weight()
        for position, token in enumerate(ids):
            head[token, position] = 1.0
    return model


def recite(
    text: str, prompt: str | list[int] = "", *, max_new_tokens: int = 50, stop: list[str] | None = None
) -> tuple[Generation, str]:
    shown: list[str] = []
    (result,) = generate_text(
        reciting_model(text),
        TOKENIZER,
        [prompt],  # pyright: ignore[reportArgumentType]  # one kind of prompt per call
        settings=GREEDY,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        on_text=lambda row, new: shown.append(new),
    )
    return result, "".join(shown)


def test_an_empty_prompt_starts_a_document_and_its_end_ends_the_text() -> None:
    result, shown = recite("Grüße: 5 €!")
    assert result == Generation((256,), tuple("Grüße: 5 €!".encode()), "end", "Grüße: 5 €!")
    assert shown == result.text


def test_a_prompt_is_continued_after_its_text() -> None:
    result, shown = recite("hello world", "hello ")
    assert result.prompt_ids == (256, *b"hello ")
    assert result.text == shown == "world"


@pytest.mark.parametrize(
    ("stop", "expected", "finish"),
    [
        (["three"], "one two ", "stop"),
        (["two", "o th"], "one ", "stop"),
        (["!"], "one two three", "end"),
        (["ee"], "one two thr", "stop"),
        (["eex"], "one two three", "end"),
    ],
)
def test_stop_strings(stop: list[str], expected: str, finish: str) -> None:
    result, shown = recite("one two three", stop=stop)
    assert (result.text, result.finish) == (expected, finish)
    assert shown == expected


def test_the_length_limit_may_cut_a_character() -> None:
    result, shown = recite("a€", max_new_tokens=2)
    assert (result.text, result.finish) == ("a\ufffd", "length")
    assert shown == result.text


def test_token_ids_are_used_as_they_are() -> None:
    result, _ = recite("abc", [256, 97])
    assert result.prompt_ids == (256, 97)
    assert result.text == "bc"


def test_rows_without_an_id_are_never_chosen() -> None:
    model = reciting_model("abc", rows=300)
    with torch.no_grad():
        model.head_weight()[280:] = 5.0
    (result,) = generate_text(model, TOKENIZER, [""], settings=GREEDY, max_new_tokens=5)
    assert result.text == "abc"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty stop string"):
        recite("abc", stop=[""])
