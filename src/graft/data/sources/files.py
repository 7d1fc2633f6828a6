"""Local files as documents."""

from __future__ import annotations

import glob
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.data.fingerprint import HASH, file_hash, fingerprint
from graft.data.sources.base import BadRows, Document, Source
from graft.data.sources.files_config import SUFFIXES, FilesSourceConfig, suffix_of
from graft.data.sources.readers import READERS, Reading
from graft.errors import DataError

FRESH_S = 2.0
"""A file written less than this long ago is hashed again next time: its clock may not have moved between two writes."""


class FilesSource(Source):
    """Documents of text, JSON Lines or Parquet files, files in sorted order, rows in theirs."""

    def __init__(self, config: FilesSourceConfig, cache_dir: Path):
        self.config = config
        self.cache_dir = cache_dir

    def files(self) -> dict[str, Path]:
        """Name within the source -> file, sorted by name.

        Raises:
            DataError: a path matches no file, or a file's format is not known.
        """
        given = self.config.path
        found: dict[str, Path] = {}
        seen: set[Path] = set()
        for pattern in (given,) if isinstance(given, str) else given:
            for name, path in self._expand(pattern):
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    found[_free_name(name, found)] = path
        if not found:
            raise DataError("no file is named", where="data.source.path", fix="name a file, a folder or a glob")
        return dict(sorted(found.items()))

    def _expand(self, pattern: str) -> Iterator[tuple[str, Path]]:
        path = Path(pattern).expanduser()
        if path.is_file():
            yield path.name, path
            return
        if path.is_dir():
            root, inside = path, sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
        elif glob.has_magic(pattern):
            inside = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            root = Path(os.path.commonpath([p.parent for p in inside])) if inside else path
        else:
            raise DataError("there is no such file or folder", where=pattern, fix="correct data.source.path")
        wanted = [p for p in inside if self.config.format != "auto" or suffix_of(p) in SUFFIXES]
        if not wanted:
            raise DataError(
                "no file matches" if not inside else f"none of the {len(inside)} files is of a known format",
                where=pattern,
                expected=f"files ending in {', '.join(SUFFIXES)} (each also with .zst)",
                fix="correct data.source.path, or set data.source.format",
            )
        for p in wanted:
            yield p.relative_to(root).as_posix(), p

    def _format(self, path: Path) -> str:
        if self.config.format != "auto":
            return self.config.format
        try:
            return SUFFIXES[suffix_of(path)]
        except KeyError:
            raise DataError(
                f"the suffix '{suffix_of(path)}' says nothing about the format",
                where=str(path),
                expected=", ".join(SUFFIXES),
                fix="set data.source.format to text, jsonl or parquet",
            ) from None

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        for name, path in self.files().items():
            reading = Reading(path, self.config.text_field, self.config.document, bad_rows)
            read = READERS[self._format(path)]
            for text, number in read(reading):
                yield Document(text, f"{name}:{number}", f"{path}:{number}")

    def fingerprint(self) -> str:
        settings = self.config.to_dict()
        del settings["path"]
        known = _KnownHashes(self.cache_dir / "file_hashes.json")
        content = {name: [self._format(path), known.hash(path)] for name, path in self.files().items()}
        known.save()
        return fingerprint("files", settings, content)


class _KnownHashes:
    """File hashes remembered by path, size, inode and time, so that large files are not read at every start."""

    def __init__(self, path: Path):
        self.path = path
        self.changed = False
        try:
            self.table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a cache: whatever is unreadable is computed again
            self.table = {}

    def hash(self, path: Path) -> str:
        stat = path.stat()
        state = [HASH, stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self.table.get(str(path.resolve()))
        if isinstance(known, list) and known[:-1] == state:
            return known[-1]
        try:
            found = file_hash(path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from error
        if time.time() - stat.st_mtime > FRESH_S:
            self.table[str(path.resolve())] = [*state, found]
            self.changed = True
        return found

    def save(self) -> None:
        if not self.changed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
            json.dump(self.table, file)
        os.replace(file.name, self.path)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _free_name(name: str, taken: dict[str, Path]) -> str:
    """``name``, numbered when files of two folders share it."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}#{number}", number + 1
    return free
