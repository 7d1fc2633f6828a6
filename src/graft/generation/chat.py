"""A running text that a person and a model write in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graft.data.tokenizers.base import Tokenizer
from graft.errors import ConfigError
from graft.generation.sampling import SamplingSettings
from graft.generation.text import generate_text
from graft.model import Model


class Conversation:
    """Everything said so far; each turn adds what the person wrote and how the model goes on.

    The model continues text, nothing more: there are no roles and no chat format. When the text no longer fits in
    ``context`` tokens its oldest tokens are forgotten (the end-of-document id at the start stays).

    Args:
        model: the model.
        tokenizer: the one it was trained with.
        settings: how tokens are chosen; every turn draws anew from ``settings.seed`` and the text so far.
        max_new_tokens: most tokens of one answer; less than ``context``.
        context: most tokens that are read, the answer included: the length the model was trained on.
        stop: strings that end an answer.

    Raises:
        ConfigError: an answer leaves no room for the text it continues.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        settings: SamplingSettings,
        max_new_tokens: int,
        context: int,
        stop: Sequence[str] = (),
    ):
        if max_new_tokens >= context - 1:
            raise ConfigError(
                f"answers of {max_new_tokens} tokens leave no room in a context of {context}",
                where="max_new_tokens",
                expected=f"less than {context - 1}",
            )
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_new_tokens = max_new_tokens
        self._room = context - max_new_tokens
        self._stop = tuple(stop)
        self._ids: list[int] = []

    def reset(self) -> None:
        """Forgets everything: the next turn starts a document."""
        self._ids = []

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The text so far, without the end-of-document id it starts from."""
        return tuple(self._ids)

    def say(self, text: str, on_text: Callable[[str], None]) -> str:
        """Adds ``text`` and continues it; ``on_text`` gets the answer as it is written. Returns the answer."""
        self._ids += self._tokenizer.encode(text)
        self._ids = self._ids[-(self._room - 1) :]
        (result,) = generate_text(
            self._model,
            self._tokenizer,
            [[self._tokenizer.end_of_document, *self._ids]],
            settings=self._settings,
            max_new_tokens=self._max_new_tokens,
            stop=self._stop,
            on_text=lambda _, new: on_text(new),
        )
        self._ids += result.token_ids
        assert result.text is not None
        return result.text
