"""Characters as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from graft.data.tokenizers.base import Tokenizer, utf8
from graft.data.tokenizers.characters_config import CharactersTokenizerConfig
from graft.errors import DataError

CHARACTERS_FILE = "characters.txt"


class CharactersTokenizer(Tokenizer):
    """Id i is the i-th of the training text's distinct characters in code point order; the last id ends a document.

    A character the training text does not hold has no id: encoding it is a `DataError` that names it.
    """

    trained = False

    def __init__(self, config: CharactersTokenizerConfig):
        self.config = config
        self.characters = ""

    def train(self, documents: Iterable[str]) -> None:
        seen: set[str] = set()
        for text in documents:
            seen.update(text)
        self._set("".join(sorted(seen)))

    def _set(self, characters: str) -> None:
        self.characters = characters
        self.end_of_document = len(characters)
        self.vocab_size = len(characters) + 1
        self._codes = _code_points(characters)
        self.trained = True

    def encode(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        assert self.trained, "train the tokenizer first"
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes)
        known = ids < len(self._codes)
        known[known] = self._codes[ids[known]] == codes[known]
        if not known.all():
            unknown = sorted({chr(code) for code in np.unique(codes[~known])})
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise DataError(
                f"the training text does not hold these characters: {shown}{more}",
                expected=f"text of the {len(self.characters)} characters of the training text",
                fix="clean the text, hold out other documents, or use data.tokenizer.type: bytes",
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids if i != self.end_of_document)

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([*(len(utf8(c)) for c in self.characters), 0], dtype=np.int32)

    def identity(self) -> Any:
        return self.characters

    def write(self, folder: Path) -> None:
        (folder / CHARACTERS_FILE).write_bytes(utf8(self.characters))

    @classmethod
    def read(cls, config: CharactersTokenizerConfig, folder: Path) -> Self:
        tokenizer = cls(config)
        tokenizer._set((folder / CHARACTERS_FILE).read_bytes().decode("utf-8"))
        return tokenizer


def _code_points(text: str) -> NDArray[np.uint32]:
    utf8(text)  # a lone surrogate has no id anywhere
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
