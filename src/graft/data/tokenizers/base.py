"""What every tokenizer is, and how one is kept in a folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from graft.config.families import TokenizerConfig
from graft.config.registry import resolve, variants
from graft.data.fingerprint import fingerprint
from graft.errors import DataError

META_FILE = "graft_tokenizer.json"
FORMAT = 1


class Tokenizer(ABC):
    """Text to token ids and back.

    Text is taken as it is: a special token's spelling inside a document is ordinary text, never the special id, so no
    document can end itself or forge a border.

    A variant whose ids come from the training text has ``trained = False`` until `train` was called.
    """

    config: TokenizerConfig
    vocab_size: int
    """Ids run from 0 to vocab_size - 1."""
    end_of_document: int
    """The id in front of every document; it is also what a prompt starts from."""
    trained: bool = True

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without the end-of-document id.

        Raises:
            DataError: the text cannot be written in this tokenizer's ids.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; the end-of-document id gives nothing, bytes that are no UTF-8 give U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int32]:
        """[V] UTF-8 bytes of text each id stands for; 0 for special ids (they are no part of the text)."""

    @abstractmethod
    def identity(self) -> Any:
        """JSON-able content that decides what `encode` gives."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """`encode` of each text, as arrays. Variants that can use several threads do."""
        return [np.asarray(self.encode(text), dtype=np.uint32) for text in texts]

    def train(self, documents: Iterable[str]) -> None:
        """Learns the ids from the training documents. Nothing to do for a tokenizer that comes trained."""
        assert self.trained, f"{type(self).__name__} must say how it is trained"

    def check_sample(self, texts: Sequence[str]) -> None:  # noqa: B027  # nothing to compare is a fine default
        """Compares a fast way of encoding with the plain one on ``texts``; there is none by default."""

    def fingerprint(self) -> str:
        """Changes when the ids of some text may change."""
        return fingerprint("tokenizer", FORMAT, self.config.to_dict()["type"], self.identity())

    def save(self, folder: Path | str) -> None:
        """Writes everything `load_tokenizer` needs into ``folder`` (made if missing)."""
        assert self.trained, "an untrained tokenizer cannot be saved"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)
        meta = {"format": FORMAT, "config": self.config.to_dict(), "fingerprint": self.fingerprint()}
        (folder / META_FILE).write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def write(self, folder: Path) -> None:  # noqa: B027  # no file is a fine default
        """Writes the variant's own files. The default has none: the config says it all."""

    @classmethod
    def read(cls, config: Any, folder: Path) -> Self:  # noqa: ARG003
        """The tokenizer that `write` left in ``folder``."""
        return cls(config)  # pyright: ignore[reportCallIssue]  # every variant is built from its config


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Reads back what `Tokenizer.save` wrote, and checks that it is the same.

    Raises:
        DataError: files are missing, broken, of an unknown type, or changed since they were written.
    """
    folder = Path(folder)
    meta_path = folder / META_FILE
    fix = "save the tokenizer again, or point to another folder"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        data = dict(meta["config"])
        config_class = variants("tokenizer")[data["type"]]
        config = config_class.model_validate(data)
        assert isinstance(config, TokenizerConfig)
        tokenizer: Tokenizer = resolve(config.implementation).read(config, folder)
    except FileNotFoundError as error:
        raise DataError(
            f"no tokenizer here: {error.filename} does not exist", where=str(folder), expected=META_FILE, fix=fix
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        problem = f"the tokenizer cannot be read: {type(error).__name__}: {error}"
        raise DataError(problem, where=str(meta_path), fix=fix) from error
    if tokenizer.fingerprint() != meta.get("fingerprint"):
        raise DataError("the tokenizer's files changed since it was saved", where=str(folder), fix=fix)
    return tokenizer


def utf8(text: str) -> bytes:
    """``text`` in UTF-8.

    Raises:
        DataError: it holds a lone surrogate, which no UTF-8 can spell.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            expected="text that can be written in UTF-8",
            fix="remove the character",
        ) from error
