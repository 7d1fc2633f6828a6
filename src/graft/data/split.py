"""Which documents are trained on and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from graft.config.experiment import DataConfig
from graft.data.fingerprint import fingerprint
from graft.data.sources.base import BadRows, Document, Source
from graft.errors import DataError

Side = Literal["train", "validation"]
SIDES: tuple[Side, Side] = ("train", "validation")

HASH_RANGE = 2**64


def key_hash(key: str) -> int:
    """A document's place in [0, 2^64): the same on every machine, whatever else the source holds."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


FAR_OFF = 2.0
"""A held-out share that many times more or less than wanted is worth a word."""


@dataclass(frozen=True)
class Census:
    """What one pass over a source found."""

    documents: int
    characters: int
    lowest: int
    highest: int


class SplitSource:
    """The documents of a run, each with its side.

    - ``validation.source``: all of the source is trained on, all of the other source is held out.
    - Otherwise a document is held out when the hash of its key is below the fraction: adding documents moves no other.
      At least one document is on each side (the one with the lowest hash is held out, the one with the highest is not).
    - A source with a single document: the last fraction of its characters is held out. Of n characters the first
      ``int(n · (1 - fraction))`` are trained on, as nanoGPT does with its character files.
    """

    def __init__(self, data: DataConfig, cache_dir: Path):
        self.source: Source = data.source.build(cache_dir)
        held_out = data.validation.source
        self.validation_source: Source | None = None if held_out is None else held_out.build(cache_dir)
        self.fraction = data.validation.fraction or self.source.default_validation_fraction
        self._census: Census | None = None

    def far_off(self, held_out: Mapping[str, int], trained_on: Mapping[str, int]) -> str | None:
        """What to say when the documents held out are another share of the text than wanted, or None.

        Args:
            held_out: ``documents`` and ``bytes`` of the validation side.
            trained_on: the same of the other.
        """
        if self.validation_source is not None:
            return None
        share = held_out["bytes"] / (held_out["bytes"] + trained_on["bytes"])
        if self.fraction / FAR_OFF <= share <= self.fraction * FAR_OFF:
            return None
        documents = held_out["documents"] + trained_on["documents"]
        return (
            f"data.validation.fraction: {self.fraction:g} of the text was to be held out, and {share:.2g} of it is "
            f"({held_out['documents']} of {documents} documents); documents are held out whole (only a single one is "
            "cut), which is coarse for few or unequal ones: hold out other files (data.validation.source), give more "
            "or shorter documents, or set another fraction"
        )

    def fingerprint(self) -> str:
        """Changes when a document or its side does."""
        if self.validation_source is not None:
            return fingerprint("split", self.source.fingerprint(), self.validation_source.fingerprint())
        return fingerprint("split", self.source.fingerprint(), self.fraction)

    def documents(self, max_bad_rows: int) -> tuple[BadRows, Iterator[tuple[Side, Document]]]:
        """One pass: the counter of skipped rows (complete when the pass is), and every document with its side.

        Raises:
            DataError: the source is empty, or more than ``max_bad_rows`` rows are unusable.
        """
        bad_rows = BadRows(max_bad_rows)
        return bad_rows, self._pass(bad_rows)

    def census(self) -> Census:
        """Counts the source's documents and characters; bad rows are not the census's business."""
        if self._census is None:
            self._census = _count(self.source)
        return self._census

    def _pass(self, bad_rows: BadRows) -> Iterator[tuple[Side, Document]]:
        if self.validation_source is not None:
            for document in self.source.documents(bad_rows):
                yield "train", document
            for document in self.validation_source.documents(bad_rows):
                yield "validation", document
            return
        census = self.census()
        if census.documents == 1:
            for document in self.source.documents(bad_rows):
                yield from self._cut(document)
            return
        below = min(max(int(self.fraction * HASH_RANGE), census.lowest + 1), census.highest)
        for document in self.source.documents(bad_rows):
            yield ("validation" if key_hash(document.key) < below else "train"), document

    def _cut(self, document: Document) -> Iterator[tuple[Side, Document]]:
        cut = int(len(document.text) * (1 - self.fraction))
        if not 0 < cut < len(document.text):
            raise DataError(
                f"the only document has {len(document.text)} characters: too few to hold out {self.fraction:g} of them",
                where=document.where,
                fix="give more text",
            )
        yield "train", replace(document, text=document.text[:cut])
        yield "validation", replace(document, text=document.text[cut:])


def _count(source: Source) -> Census:
    documents = characters = highest = 0
    lowest = HASH_RANGE
    for document in source.documents(BadRows(2**63)):
        place = key_hash(document.key)
        lowest, highest = min(lowest, place), max(highest, place)
        documents += 1
        characters += len(document.text)
    return Census(documents, characters, lowest, highest)
