"""UTF-8 bytes as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.tokenizers.base import Tokenizer, utf8
from graft.data.tokenizers.bytes_config import BytesTokenizerConfig


class BytesTokenizer(Tokenizer):
    """Id b is the byte b of the text's UTF-8; id 256 ends a document. Needs no training and knows every text."""

    vocab_size = 257
    end_of_document = 256

    def __init__(self, config: BytesTokenizerConfig):
        self.config = config

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.end_of_document).decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        sizes = np.ones(self.vocab_size, dtype=np.int32)
        sizes[self.end_of_document] = 0
        return sizes

    def identity(self) -> Any:
        return "utf-8"
