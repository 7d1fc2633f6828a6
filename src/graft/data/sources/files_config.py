"""Config of local files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import SourceConfig


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
        if self.format in ("jsonl", "parquet") and self.document != "file":
            yield Problem(("document",), f"document does nothing for {self.format}: a row is a document", "remove it")
        if self.format == "text" and self.text_field != "text":
            yield Problem(("text_field",), "text_field does nothing for text files", "remove it")
