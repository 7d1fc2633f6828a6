"""A tokenizer in the Hugging Face format: what the trained BPE and the tokenizer files share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from graft.config.families import TokenizerConfig
from graft.data.tokenizers import byte_level
from graft.data.tokenizers.base import Tokenizer, utf8
from graft.data.tokenizers.tiktoken_path import TiktokenPath
from graft.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
END_FILE = "end_of_document.json"


class HuggingFaceTokenizer(Tokenizer):
    """Wraps a ``tokenizers.Tokenizer``.

    Its ``encode`` is the plain way. With tiktoken installed, byte-level BPE goes through it (several times as fast,
    same merges); `check_sample` compares both and drops the fast way when any id differs.

    Deviation from the library's default: special tokens written out in a text are encoded as ordinary text.
    """

    trained = False

    def __init__(self, config: TokenizerConfig):
        self.config = config

    def load(self, raw: str, end_of_document: str, where: str) -> None:
        """Takes over the JSON ``raw`` of a tokenizer.json.

        Raises:
            DataError: the JSON is no tokenizer, or it does not hold the end-of-document token.
        """
        try:
            self.plain = tokenizers.Tokenizer.from_str(raw)
        except Exception as error:  # the library raises bare Exception
            problem = f"not a tokenizer.json: {error}"
            raise DataError(problem, where=where, fix="give a file that the tokenizers library reads") from error
        self.plain.no_padding()  # batches must hold the text's ids and nothing else
        self.plain.no_truncation()
        self.plain.encode_special_tokens = True
        end = self.plain.token_to_id(end_of_document)
        if end is None:
            raise DataError(
                f"the end-of-document token '{end_of_document}' is not in the vocabulary",
                where=where,
                fix="set data.tokenizer.end_of_document to a token of the vocabulary",
            )
        self.raw = raw
        self.end_token = end_of_document
        self.end_of_document = end
        self.vocab_size = max(self.plain.get_vocab(with_added_tokens=True).values()) + 1
        self._bytes = byte_level.token_bytes(raw, where)
        self._bytes[end] = 0
        self.fast = TiktokenPath.of(raw)
        self.trained = True
        self.check_sample(BUILT_IN_SAMPLE)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_plain(self, text: str) -> list[int]:
        """`encode` by the tokenizers library alone: the reference of the fast way."""
        utf8(text)
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        assert self.trained, "train the tokenizer first"
        for text in texts:
            utf8(text)
        if self.fast is not None:
            return self.fast.encode_batch(texts)
        encodings = self.plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def check_sample(self, texts: Sequence[str]) -> None:
        if self.fast is None:
            return
        fast = self.fast.encode_batch(texts)
        if any(ids.tolist() != self.encode_plain(text) for ids, text in zip(fast, texts, strict=True)):
            self.fast = None

    def decode(self, ids: Sequence[int]) -> str:
        assert self.trained, "train the tokenizer first"
        return self.plain.decode([int(i) for i in ids if i != self.end_of_document], skip_special_tokens=False)

    def token_bytes(self) -> NDArray[np.int32]:
        return self._bytes.copy()

    def identity(self) -> Any:
        return [json.loads(self.raw), self.end_token]

    def write(self, folder: Path) -> None:
        (folder / TOKENIZER_FILE).write_bytes(self.raw.encode())
        (folder / END_FILE).write_text(json.dumps(self.end_token), encoding="utf-8")

    @classmethod
    def read(cls, config: Any, folder: Path) -> Self:
        tokenizer = cls.__new__(cls)
        HuggingFaceTokenizer.__init__(tokenizer, config)
        path = folder / TOKENIZER_FILE
        end = json.loads((folder / END_FILE).read_text(encoding="utf-8"))
        tokenizer.load(path.read_bytes().decode("utf-8"), end, str(path))
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "raw": self.raw, "end": self.end_token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HuggingFaceTokenizer.__init__(self, state["config"])
        self.load(state["raw"], state["end"], "pickle")


BUILT_IN_SAMPLE = (
    "The quick brown fox can't jump over 13 lazy dogs; it'll try 2.5 times -- and it's FINE.\n\n\tdef f(x):\n"
    "        return x ** 2  # ok\n",
    "aaaaaaaaaaaaaaaaaaaaaaa    \n \n\n\t\t  =======-----=====  ......\r\n  end   ",
    "Zürich, naïve café, Ελληνικά, русский, 中文字符, 日本語, हिन्दी, ๑๒๓, ½ ² Ⅷ, 👩‍👩‍👧 🇨🇭 "
    "\u00a0\u2003\u3000\u0085 e\u0301",
    "<|endoftext|> <s> </s> <0x41> ▁ '' 'S 'LL '",
    "",
)
"""Text on which both ways of encoding are compared whenever a tokenizer is loaded."""
