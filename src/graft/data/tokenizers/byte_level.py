"""Facts about tokenizers in the Hugging Face format: the byte alphabet, pre-tokenizer patterns, bytes per token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.errors import DataError

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text into pieces before merging: what ``ByteLevel(use_regex=True)`` applies."""

SINGLE_DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""As GPT-2's, but every digit is a piece of its own."""


@cache
def byte_of_character() -> Mapping[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 bytes stand for themselves; the others, in order, take the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    table = {chr(b): b for b in printable}
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


def bytes_of_token(token: str) -> bytes | None:
    """The bytes a byte-level token stands for; None when a character is not of the byte alphabet."""
    table = byte_of_character()
    try:
        return bytes(table[c] for c in token)
    except KeyError:
        return None


def steps(spec: Mapping[str, Any], key: str, children: str) -> list[Mapping[str, Any]]:
    """The flat list of a tokenizer's ``key`` stage (pre_tokenizer, decoder, normalizer), sequences opened."""

    def flatten(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
        if not node:
            return
        if node["type"] == "Sequence":
            for child in node[children]:
                yield from flatten(child)
        else:
            yield node

    return list(flatten(spec.get(key)))


def vocabulary(spec: Mapping[str, Any]) -> dict[int, str]:
    """Id -> token of the model's own vocabulary, without added tokens."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        return {i: token for token, i in vocab.items()}
    return {i: token for i, (token, _) in enumerate(vocab)}  # Unigram


def token_bytes(raw: str, where: str) -> NDArray[np.int32]:
    """[V] UTF-8 bytes of text behind each id of a ``tokenizer.json``.

    - Byte-level vocabularies (GPT-2, Llama 3, Qwen): exact.
    - SentencePiece-like ones (Gemma, Llama 2): ``▁`` counts as one space, ``<0xAB>`` as one byte. A space that the
      tokenizer puts in front of a text counts although the text does not hold it: one byte per document.
    - WordPiece (BERT): the bytes of the piece without its ``##``. The spaces between words belong to no token and are
      not counted, so bits per byte come out too high, never too low.
    - Added tokens: 0 if special, else the bytes of their spelling.

    Raises:
        DataError: the vocabulary is of none of these kinds.
    """
    spec = json.loads(raw)
    ids = vocabulary(spec)
    added = {entry["id"]: entry for entry in spec.get("added_tokens", ())}
    sizes = np.zeros(max([*ids, *added]) + 1, dtype=np.int32)
    size_of = _size_function(spec, where)
    for i, token in ids.items():
        sizes[i] = size_of(token)
    for i, entry in added.items():
        sizes[i] = 0 if entry["special"] else len(entry["content"].encode())
    return sizes


def _size_function(spec: Mapping[str, Any], where: str) -> Any:
    decoders = {step["type"] for step in steps(spec, "decoder", "decoders")}
    pre = {step["type"] for step in steps(spec, "pre_tokenizer", "pretokenizers")}
    if "ByteLevel" in decoders | pre:
        return _byte_level_size
    if "Metaspace" in decoders | pre or "ByteFallback" in decoders or spec["model"]["type"] == "Unigram":
        return _sentencepiece_size
    if spec["model"]["type"] == "WordPiece":
        return lambda token: len(token.removeprefix("##").encode())
    raise DataError(
        f"bytes per token are not known for a {spec['model']['type']} tokenizer with the decoder {sorted(decoders)}",
        where=where,
        expected="a byte-level, SentencePiece-like or WordPiece tokenizer",
        fix="use another tokenizer",
    )


def _byte_level_size(token: str) -> int:
    spelled = bytes_of_token(token)
    return len(token.encode() if spelled is None else spelled)


def _sentencepiece_size(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())
