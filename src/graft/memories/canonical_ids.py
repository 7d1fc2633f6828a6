"""Token ids by the class of their text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graft.data.tokenizers.base import Tokenizer
from graft.initialization import Rng

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no UTF-8 by themselves."""


def canonical_text(text: str) -> str | None:
    """``text`` in the form in which equal tokens are equal: NFKC, case folded, no spaces around it.

    None for a text that is nobody else's: an empty one (special ids), or part of a character.
    """
    if not text or REPLACEMENT in text:
        return None
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.strip() or " "


def canonical_classes(texts: Sequence[str]) -> list[int]:
    """For each id, the lowest id with the same canonical text."""
    first: dict[str, int] = {}
    classes: list[int] = []
    for number, text in enumerate(texts):
        canonical = canonical_text(text)
        classes.append(number if canonical is None else first.setdefault(canonical, number))
    return classes


class CanonicalIds(nn.Module):
    """``id -> class``, a buffer that is saved with the model. Every id is its own class until `read_tokenizer`.

    Args:
        vocab_size: ids (V).
    """

    classes: Tensor

    def __init__(self, vocab_size: int):
        super().__init__()
        self.register_buffer("classes", torch.empty(vocab_size, dtype=torch.int64))

    def init_parameters(self, rng: Rng) -> None:
        self.classes.copy_(torch.arange(len(self.classes)))

    def read_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Takes the classes from the texts of a tokenizer's ids; ids beyond its vocabulary keep their own."""
        texts = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
        classes = torch.tensor(canonical_classes(texts))
        self.classes[: len(classes)] = classes.to(self.classes.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Classes of ids, of the same shape."""
        return self.classes[ids]
