"""Text in, text out: prompts from strings, decoded text as it arrives, stop strings across token borders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from graft.data.tokenizers.base import Tokenizer
from graft.errors import ConfigError
from graft.generation import engine
from graft.generation.engine import Generation
from graft.generation.sampling import SamplingSettings
from graft.model import Model

REPLACEMENT = "\ufffd"
_MAX_HELD = 3
"""A UTF-8 character has at most four bytes, so at most three replacement marks stand for one that may yet complete."""
_WINDOW = 64
"""Tokens decoded again at each step; a longer window is cut to `_CONTEXT` tokens so that a step's cost is bounded."""
_CONTEXT = 8
"""Tokens kept before the new ones, because decoders treat the start of a text differently (leading spaces)."""

OnText = Callable[[int, str], None]
"""Called with (row, new text) whenever text becomes certain."""


class TextStream:
    """Decodes a growing token sequence; what it gives out, joined, equals decoding the whole at once.

    A character whose bytes are spread over tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain (often a little late, possibly empty)."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        held = len(text) - len(text.rstrip(REPLACEMENT))
        certain = len(text) - min(held, _MAX_HELD)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        if held == 0 and len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._given = len(self._tokenizer.decode(self._window))
        return new

    def finish(self) -> str:
        """The text still held back: bytes that no further token will complete."""
        text = self._tokenizer.decode(self._window)
        new = text[self._given :]
        self._given = len(text)
        return new


class StopFinder:
    """Passes text on until a stop string appears; holds back what may be the start of one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that comes before any stop string and cannot become one."""
        if self.stopped:
            return ""
        self._held += text
        # the one that ends first (then the longest): where a token's border falls must not matter
        ends = [(i + len(s), i) for i, s in ((self._held.find(s), s) for s in self._stop) if i >= 0]
        if ends:
            self.stopped = True
            passed, self._held = self._held[: min(ends)[1]], ""
            return passed
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        passed, self._held = self._held, ""
        return passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a start of ``stop`` (but not all of it)."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Writer:
    """The text of one row: tokens in, certain text out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._stream = TextStream(tokenizer)
        self._finder = StopFinder(stop)
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self._finder.stopped

    def push(self, token: int) -> str:
        new = self._finder.push(self._stream.push(token))
        self.text += new
        return new

    def finish(self) -> str:
        if self.stopped:
            return ""
        new = self._finder.push(self._stream.finish())
        new += self._finder.finish()
        self.text += new
        return new


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt: the end-of-document id, from which every training document starts, then the text's."""
    return [tokenizer.end_of_document, *tokenizer.encode(text)]


def generate_text(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
) -> list[Generation]:
    """Continues texts as documents; each ends at the end-of-document id, at a stop string or at ``max_new_tokens``.

    Args:
        model: the model.
        tokenizer: the one it was trained with.
        prompts: texts (see `prompt_ids`; an empty one starts a new document), or token ids used as they are.
        settings: how tokens are chosen.
        max_new_tokens: most tokens added to each prompt.
        stop: strings that end a text; found across token borders and left out of the result.
        on_text: called with text as it becomes certain; joined it equals the result's ``text``.

    Raises:
        ConfigError: an empty stop string, or a prompt that cannot be continued.
    """
    if any(not s for s in stop):
        raise ConfigError("an empty stop string would end every text at once", where="stop")
    ids = [prompt_ids(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    writers = [_Writer(tokenizer, stop) for _ in ids]

    def on_token(row: int, token: int) -> bool:
        new = writers[row].push(token)
        if new and on_text is not None:
            on_text(row, new)
        return writers[row].stopped

    generations = engine.generate(
        model,
        ids,
        settings=settings,
        max_new_tokens=max_new_tokens,
        end_ids=(tokenizer.end_of_document,),
        vocab_size=min(model.vocab_size, tokenizer.vocab_size),
        on_token=on_token,
    )
    for row, writer in enumerate(writers):
        rest = writer.finish()
        if rest and on_text is not None:
            on_text(row, rest)
    return [
        dataclasses.replace(
            generation,
            text=writer.text,
            # a stop string may only become certain once nothing more follows
            finish="stop" if writer.stopped else generation.finish,
        )
        for generation, writer in zip(generations, writers, strict=True)
    ]
