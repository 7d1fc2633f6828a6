"""Tokens on disk: memory-mapped shards with an index of documents, checked when they are opened.

A store is a folder: ``shard-00000.bin`` … (token ids, little-endian uint16 or uint32), ``documents.bin`` (int64 tokens
of each document, its end-of-document id included) and ``manifest.json`` (sizes, hashes, counts). A document lies in
one shard; shards follow each other as one stream of tokens.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from graft.data.fingerprint import HASH, file_hash
from graft.errors import DataError

STORE_FORMAT = 1
MANIFEST = "manifest.json"
DOCUMENTS_FILE = "documents.bin"
VERIFIED_FILE = "verified.json"

ALWAYS_VERIFIED_BYTES = 64 * 2**20
"""Stores up to this size are read and hashed at every start (a fraction of a second); larger ones when changed."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One file of tokens, as the manifest describes it."""

    file: str
    tokens: int
    documents: int
    hash: str


class TokenStore:
    """Documents as token ids, each beginning with the end-of-document id.

    Args:
        folder: where the store lies.
        manifest: the content of its manifest.

    Attributes:
        starts: [documents + 1] position of each document's first token in the stream, and the stream's end.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.shards = [Shard(**shard) for shard in manifest["shards"]]
        self.vocab_size: int = manifest["vocab_size"]
        self.end_of_document: int = manifest["end_of_document"]
        self.num_bytes: int = manifest["bytes"]
        dtype = token_dtype(self.vocab_size)
        self._arrays = [np.memmap(folder / s.file, dtype=dtype, mode="r") for s in self.shards]
        self._shard_starts = np.cumsum([0, *(s.tokens for s in self.shards)])
        lengths = np.fromfile(folder / DOCUMENTS_FILE, dtype="<i8")
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @classmethod
    def open(cls, folder: Path, *, verify: bool | None = None) -> Self:
        """Opens and checks a store.

        Args:
            folder: the store.
            verify: True reads and hashes everything; None does so for small stores and for files that changed since
                they were last verified. Sizes are checked always.

        Raises:
            DataError: a file is missing, has the wrong size or content, or holds an id outside the vocabulary.
        """
        manifest = _read_manifest(folder)
        try:
            check_store(folder, manifest, verify=verify)
            return cls(folder, manifest)
        except (KeyError, TypeError, OSError) as error:
            raise _damaged(folder, f"the store cannot be read: {type(error).__name__}: {error}") from error

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, end-of-document ids included."""
        return int(self.starts[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents] tokens of each document, its end-of-document id included."""
        return np.diff(self.starts)

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids at any ``positions`` of the stream, in the shape of ``positions``."""
        if len(self._arrays) == 1:
            return self._arrays[0][positions].astype(np.int64)
        out = np.empty(positions.shape, dtype=np.int64)
        shard_of = np.searchsorted(self._shard_starts, positions, side="right") - 1
        for i in np.unique(shard_of):
            here = shard_of == i
            out[here] = self._arrays[i][positions[here] - self._shard_starts[i]]
        return out

    def document(self, index: int) -> NDArray[np.int64]:
        """The ids of one document, the end-of-document id first."""
        return self.gather(np.arange(self.starts[index], self.starts[index + 1]))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.manifest)


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        problem, where=str(path), fix="delete the folder it lies in; the next run tokenises the text again"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"the manifest cannot be read: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != STORE_FORMAT:
        raise _damaged(path, f"the store's format is {found}, this graft reads {STORE_FORMAT}")
    return manifest


def check_store(folder: Path, manifest: dict[str, Any], *, verify: bool | None) -> None:
    """Sizes always; ids and hashes as `TokenStore.open` says. Raises DataError naming file and offset."""
    dtype = token_dtype(manifest["vocab_size"])
    files = [(s["file"], s["tokens"] * dtype.itemsize, s["hash"]) for s in manifest["shards"]]
    files.append((DOCUMENTS_FILE, manifest["documents"] * 8, manifest["documents_hash"]))
    for name, size, _ in files:
        _check_size(folder / name, size)
    state = {name: [size, (folder / name).stat().st_mtime_ns] for name, size, _ in files}
    if verify is None:
        verify = sum(size for _, size, _ in files) <= ALWAYS_VERIFIED_BYTES or _verified(folder) != state
    if not verify:
        return
    for name, _, expected in files:
        if name != DOCUMENTS_FILE:
            _check_ids(folder / name, dtype, manifest["vocab_size"])
        if file_hash(folder / name) != expected:
            raise _damaged(folder / name, f"the content changed since it was written ({HASH} differs)")
    _remember(folder, state)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"the file is missing: {error.strerror}") from error
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise _damaged(path, f"the file is {kind}: it ends at byte {found} and should end at byte {expected}")


def _check_ids(path: Path, dtype: np.dtype[Any], vocab_size: int) -> None:
    tokens = np.memmap(path, dtype=dtype, mode="r")
    step = 2**24
    for start in range(0, len(tokens), step):
        piece = tokens[start : start + step]
        if piece.max() >= vocab_size:
            offset = start + int(np.argmax(piece >= vocab_size))
            raise _damaged(
                path,
                f"token id {tokens[offset]} at byte {offset * dtype.itemsize} (token {offset}) is outside the "
                f"vocabulary of {vocab_size}",
            )


def _verified(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remember(folder: Path, state: dict[str, Any]) -> None:
    temporary = folder / f"{VERIFIED_FILE}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, folder / VERIFIED_FILE)
    except OSError:  # a read-only cache is verified again next time, nothing more
        return
