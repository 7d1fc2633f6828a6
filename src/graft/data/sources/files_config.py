"""Config of local files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import SourceConfig

SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
"""Suffix (before ``.zst``) -> format, for ``format: auto``."""


def suffix_of(path: str | PurePath) -> str:
    """The suffix that tells a file's format."""
    return PurePath(PurePath(path).name.removesuffix(".zst")).suffix.lower()


class FilesSourceConfig(SourceConfig):
    """Text, JSON Lines or Parquet files: a path, a folder (searched recursively), a glob, or a list of these."""

    implementation = "graft.data.sources.files:FilesSource"
    type: Literal["files"] = knob("files", "tag")
    path: str | tuple[str, ...] = knob(doc="file, folder or glob, or a list of them; '.zst' files are read directly")
    format: Literal["auto", "text", "jsonl", "parquet"] = knob(
        "auto", "auto: by suffix (.txt/.md, .jsonl/.json, .parquet)"
    )
    text_field: str = knob("text", "field of a JSON Lines or Parquet row that holds the text")
    document: Literal["file", "paragraph", "line"] = knob(
        "file", "what is one document in a text file: the file, a paragraph (blank lines between), or a line"
    )

    def problems(self) -> Iterator[Problem]:
        formats = self._formats()
        if formats and "text" not in formats and self.document != "file":
            words = " and ".join(sorted(formats))
            yield Problem(("document",), f"document does nothing for {words}: a row is a document", "remove it")
        if formats == {"text"} and self.text_field != "text":
            yield Problem(("text_field",), "text_field does nothing for text files", "remove it")

    def _formats(self) -> set[str]:
        """The formats of all files, as far as their names in the config tell; empty when they do not."""
        if self.format != "auto":
            return {self.format}
        given = (self.path,) if isinstance(self.path, str) else self.path
        formats = {SUFFIXES.get(suffix_of(path)) for path in given}
        return {known for known in formats if known is not None} if None not in formats else set()
