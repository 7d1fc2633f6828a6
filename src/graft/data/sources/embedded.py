"""The embedded corpus as documents."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from graft.data.fingerprint import file_hash, fingerprint
from graft.data.sources.base import BadRows, Document, Source
from graft.data.sources.embedded_config import EmbeddedSourceConfig
from graft.data.sources.harvest import harvest
from graft.errors import DataError

HARVEST_VERSION = 1
"""Part of the cached file's name: raise it when `graft.data.sources.harvest` gives other text."""


class EmbeddedSource(Source):
    """Prose of the running Python (see `graft.data.sources.harvest`): one document per module or topic.

    The text depends on the Python version, so numbers are comparable on one version only; the fingerprint says which.
    Harvested once (about ten seconds) and kept in the cache folder. A C module is on the same side of the split as the
    Python module it serves (``_bisect`` and ``bisect``), for they share sentences.
    """

    def __init__(self, config: EmbeddedSourceConfig, cache_dir: Path):
        self.config = config
        python = fingerprint("harvest", HARVEST_VERSION, sys.version, sysconfig.get_paths()["stdlib"])
        self.path = cache_dir / f"embedded-{python}.jsonl"

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        self._ensure()
        left = self.config.max_characters
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                name, paragraphs = json.loads(line)
                text = "\n\n".join(paragraphs)
                if left is not None:
                    text = text[:left]
                    left -= len(text)
                if text:
                    key = name.removesuffix(" (C)").lstrip("_")
                    yield Document(text, key, name)

    def fingerprint(self) -> str:
        self._ensure()
        return fingerprint("embedded", self.config.max_characters, file_hash(self.path))

    def _ensure(self) -> None:
        """Harvests, unless the cached file is there and whole."""
        if self._valid():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.path) + ".lock"):
            if self._valid():
                return
            lines = [json.dumps(section) + "\n" for section in harvest()]
            if not lines:
                raise DataError(
                    "this Python carries no documentation",
                    where=sys.executable,
                    expected="docstrings in its standard library",
                    fix="use a full Python, or data.source.type: files",
                )
            body = "".join(lines).encode()
            with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".tmp", delete=False) as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            self._sum.write_text(hashlib.blake2b(body, digest_size=16).hexdigest())
            os.replace(file.name, self.path)

    @property
    def _sum(self) -> Path:
        return self.path.with_suffix(".hash")

    def _valid(self) -> bool:
        try:
            return self._sum.read_text() == file_hash(self.path)
        except OSError:
            return False
