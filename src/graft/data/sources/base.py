"""What every source of documents is, and how unusable rows are counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from graft.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text that is trained on as a whole.

    Args:
        text: never empty, without NUL, can be written in UTF-8.
        key: names the document within its source, whatever folder the source lies in; decides its side of the
            train/validation split. Documents with the same key are on the same side.
        where: file and line, for messages.
    """

    text: str
    key: str
    where: str


class BadRows:
    """Counts the rows of one pass over a source that were skipped, by cause.

    Args:
        allowed: how many may be skipped; one more is an error.
    """

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.causes: Counter[str] = Counter()
        self.first: list[str] = []

    def skip(self, cause: str, where: str) -> None:
        """Counts one row. Raises DataError, naming this row, when more are bad than allowed."""
        self.causes[cause] += 1
        if len(self.first) < 5:
            self.first.append(f"{where}: {cause}")
        total = self.causes.total()
        if total > self.allowed:
            counts = ", ".join(f"{n} {c}" for c, n in sorted(self.causes.items()))
            raise DataError(
                f"unusable row: {cause}" + (f" (so far: {counts})" if total > 1 else ""),
                where=where,
                expected=f"at most {self.allowed} unusable rows (data.max_bad_rows)",
                fix="repair the row, or raise data.max_bad_rows to skip such rows",
            )


class Source(ABC):
    """Where documents come from. Built by ``config.build(cache_dir)``; every pass gives the same documents in the
    same order, without ever holding all of them in memory."""

    default_validation_fraction: ClassVar[float] = 0.05
    """Held-out share when the config does not say."""

    @abstractmethod
    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        """One pass over all documents; rows that cannot be used are given to ``bad_rows``.

        Raises:
            DataError: nothing to read, a file cannot be read, or too many bad rows.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents do; does not depend on where files lie or when they were written."""
