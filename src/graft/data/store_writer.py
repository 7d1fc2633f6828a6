"""Writes a token store so that a killed writer can continue where its last commit was."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from graft.data.fingerprint import file_hash
from graft.data.store import DOCUMENTS_FILE, MANIFEST, STORE_FORMAT, token_dtype

SHARD_TOKENS = 2**26
"""A shard is closed by the first document that reaches this many tokens."""


class StoreWriter:
    """Appends documents to a store that is being built.

    Everything up to the last `commit` survives a kill: a new writer with the state that commit returned cuts off what
    came after it and goes on, and the files end up byte for byte as without the kill.

    Args:
        folder: the store's folder.
        vocab_size: ids must be below it.
        end_of_document: the id put in front of every document.
        state: what the last commit returned; None starts anew.
    """

    def __init__(self, folder: Path, *, vocab_size: int, end_of_document: int, state: dict[str, Any] | None = None):
        self.folder = folder
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.end_of_document = end_of_document
        folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[dict[str, int]] = [dict(shard) for shard in state["shards"]] if state else []
        self.bytes: int = state["bytes"] if state else 0
        self._lengths = self._reopen(DOCUMENTS_FILE, 8 * sum(s["documents"] for s in self.shards))
        self._tokens: IO[bytes] | None = None
        if self.shards:
            self._tokens = self._reopen(self._name(-1), self.shards[-1]["tokens"] * self.dtype.itemsize)

    def _name(self, index: int) -> str:
        return f"shard-{range(len(self.shards))[index]:05d}.bin"

    def _reopen(self, name: str, size: int) -> IO[bytes]:
        """The file, cut to ``size`` bytes, open for appending."""
        path = self.folder / name
        path.touch()
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def append(self, documents: Sequence[NDArray[np.uint32]], num_bytes: int) -> None:
        """Adds documents (ids without the end-of-document id) that hold ``num_bytes`` bytes of text together."""
        start = 0
        while start < len(documents):
            if self._tokens is None or self.shards[-1]["tokens"] >= SHARD_TOKENS:
                self._next_shard()
            stop, tokens = start, self.shards[-1]["tokens"]
            while stop < len(documents) and tokens < SHARD_TOKENS:
                tokens += len(documents[stop]) + 1
                stop += 1
            self._write(documents[start:stop])
            start = stop
        self.bytes += num_bytes

    def _next_shard(self) -> None:
        self._sync(self._tokens)
        if self._tokens is not None:
            self._tokens.close()
        self.shards.append({"tokens": 0, "documents": 0})
        self._tokens = self._reopen(self._name(-1), 0)

    def _write(self, documents: Sequence[NDArray[np.uint32]]) -> None:
        assert self._tokens is not None
        end = np.array([self.end_of_document], dtype=np.uint32)
        stream = np.concatenate([part for ids in documents for part in (end, ids)])
        assert int(stream.max()) < self.vocab_size, "the tokenizer gave an id outside its own vocabulary"
        self._tokens.write(stream.astype(self.dtype).tobytes())
        self._lengths.write(np.array([len(ids) + 1 for ids in documents], dtype="<i8").tobytes())
        self.shards[-1]["tokens"] += len(stream)
        self.shards[-1]["documents"] += len(documents)

    @staticmethod
    def _sync(file: IO[bytes] | None) -> None:
        if file is not None:
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> dict[str, Any]:
        """Puts everything on the disk; returns the state to continue from."""
        self._sync(self._tokens)
        self._sync(self._lengths)
        return {"shards": [dict(shard) for shard in self.shards], "bytes": self.bytes}

    def finish(self) -> dict[str, Any]:
        """Writes the manifest and closes the files; returns the manifest."""
        self.commit()
        self.close()
        shards = [
            {"file": self._name(i), **shard, "hash": file_hash(self.folder / self._name(i))}
            for i, shard in enumerate(self.shards)
        ]
        manifest = {
            "format": STORE_FORMAT,
            "vocab_size": self.vocab_size,
            "end_of_document": self.end_of_document,
            "documents": sum(s["documents"] for s in self.shards),
            "tokens": sum(s["tokens"] for s in self.shards),
            "bytes": self.bytes,
            "shards": shards,
            "documents_hash": file_hash(self.folder / DOCUMENTS_FILE),
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def close(self) -> None:
        """Closes the files; what was not committed may be lost."""
        for file in (self._tokens, self._lengths):
            if file is not None:
                file.close()


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that a kill leaves the old content or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` durable (POSIX; nothing to do elsewhere)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
