"""Rows of text, JSON Lines and Parquet files, compressed or not. A bad row is reported, never raised."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from graft.data.sources.base import BadRows
from graft.errors import DataError, missing_extra

MAX_LINE_BYTES = 50_000_000
"""A line of this many bytes or more is bad: it is never one row of text, and must not fill the memory."""

Row = tuple[str, int]
"""Text and the number of its first line (or row), from 1."""


@dataclass(frozen=True)
class Reading:
    """How to read one file.

    Args:
        path: the file.
        text_field: field of a JSON or Parquet row that holds the text.
        document: what is one document in a text file.
        bad_rows: told of every row that is skipped.
    """

    path: Path
    text_field: str
    document: Literal["file", "paragraph", "line"]
    bad_rows: BadRows

    def where(self, line: int) -> str:
        """``file:line``."""
        return f"{self.path}:{line}"


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes as a stream, decompressed if its name ends in ``.zst``.

    Raises:
        DataError: it cannot be opened or read, or is no valid zstd data.
        ResourceError: zstandard is not installed.
    """
    try:
        with path.open("rb") as raw:
            yield _decompressed(raw) if path.suffix == ".zst" else raw
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), fix="check the file") from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise DataError(
                f"broken zstd data: {error}", where=str(path), expected="a complete .zst file", fix="compress it again"
            ) from error
        raise


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("zstandard", "data", "reading .zst files") from error
    return io.BufferedReader(_Zstd(raw, zstandard.ZstdDecompressor()), buffer_size=2**20)


class _Zstd(io.RawIOBase):
    """The content of a file of zstd frames. Unlike the library's own reader, it notices a cut-off end."""

    def __init__(self, raw: IO[bytes], decompressor: Any):
        self._raw = raw
        self._decompressor = decompressor
        self._frame = decompressor.decompressobj()
        self._begun = False
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._compressed:
                self._compressed = self._raw.read(2**17)
            if not self._compressed:
                if self._begun and not self._frame.eof:
                    raise DataError(
                        "the file is cut off: its zstd data does not end", where=self._raw.name, fix="copy it again"
                    )
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._begun = True
            self._compressed = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line, its end stripped; None for a line that is too long (its bytes are dropped)."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.rstrip(b"\r\n")


def usable(text: str) -> str | None:
    """Why ``text`` cannot be a document, or None."""
    if not text.strip():
        return "empty text"
    if "\0" in text:
        return "NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate"
    return None


def read_jsonl(reading: Reading) -> Iterator[Row]:
    """The text field of every line; blank lines are no rows."""
    with open_bytes(reading.path) as stream:
        for number, line in _lines(stream):
            if line is not None and not line.strip():
                continue
            text, cause = _json_text(line, reading.text_field)
            if cause is None:
                yield text, number
            else:
                reading.bad_rows.skip(cause, reading.where(number))


def _json_text(line: bytes | None, field: str) -> tuple[str, str | None]:
    """The text of one line, or the cause that there is none."""
    if line is None:
        return "", f"line of {MAX_LINE_BYTES // 10**6} MB or more"
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    except (ValueError, RecursionError):
        return "", "broken JSON"
    if not isinstance(row, dict):
        return "", "row is no object"
    if field not in row:
        return "", f"no field '{field}'"
    text = row[field]
    if not isinstance(text, str):
        return "", f"field '{field}' is no string"
    return text, usable(text)


def read_parquet(reading: Reading) -> Iterator[Row]:
    """The text column, a batch of rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data", "reading Parquet files") from error
    number, field = 0, reading.text_field
    try:
        with open_bytes(reading.path) as stream:
            seekable = stream if reading.path.suffix != ".zst" else pyarrow.BufferReader(stream.read())
            table = pyarrow.parquet.ParquetFile(seekable)
            if field not in table.schema_arrow.names:
                raise DataError(
                    f"no column '{field}'",
                    where=str(reading.path),
                    expected=f"one of {', '.join(table.schema_arrow.names)}",
                    fix="set data.source.text_field",
                )
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    cause = usable(value) if isinstance(value, str) else f"field '{field}' is no string"
                    if cause is None:
                        yield value, number
                    else:
                        reading.bad_rows.skip(cause, reading.where(number))
    except pyarrow.ArrowException as error:
        raise DataError(f"no readable Parquet: {error}", where=str(reading.path), fix="write it again") from error


def read_text(reading: Reading) -> Iterator[Row]:
    """Documents of a text file: the file, its paragraphs or its lines. ``\\r\\n`` and ``\\r`` count as ``\\n``."""
    with open_bytes(reading.path) as stream:
        if reading.document == "file":
            rows = iter([(stream.read(), 1)])
        elif reading.document == "line":
            rows = ((line, number) for number, line in _lines(stream))
        else:
            rows = _paragraphs(stream)
        for raw, number in rows:
            text, cause = _plain_text(raw)
            if cause is None:
                yield text, number
            elif cause != "empty text" or reading.document == "file":  # blank lines only part lines and paragraphs
                reading.bad_rows.skip(cause, reading.where(number))


def _plain_text(raw: bytes | None) -> tuple[str, str | None]:
    if raw is None:
        return "", f"line of {MAX_LINE_BYTES // 10**6} MB or more"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text, usable(text)


def _paragraphs(stream: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Runs of lines that are not blank, with the number of their first line; None for one with a line too long."""
    lines: list[bytes] = []
    first, too_long = 1, False
    for number, line in _lines(stream):
        if line is None or line.strip():
            if not lines and not too_long:
                first = number
            too_long |= line is None
            lines.append(line or b"")
        elif lines:
            yield (None if too_long else b"\n".join(lines)), first
            lines, too_long = [], False
    if lines:
        yield (None if too_long else b"\n".join(lines)), first


READERS: dict[str, Callable[[Reading], Iterator[Row]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
"""Format -> reader of its rows."""
