"""The manifest of a checkpoint: what is in it, how large, and with which hash; it is written last and read first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.training import durable

MANIFEST = "manifest.json"
FORMAT = 1
ALLOWED_SUFFIXES = (".safetensors", ".json")
"""Nothing else is ever opened: a pickle runs code when it is read."""

_MAX_BYTES = 64 * 2**20
"""Of a manifest. A larger one is damage or an attack, and is not read into memory."""


class ManifestError(Exception):
    """Why a folder's manifest cannot be used; a reason for the caller's message, never shown alone."""


class NoManifest(ManifestError):
    """There is no manifest, or no JSON in it: the folder is not a finished checkpoint of ours."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and its blake2b-256 in hexadecimal."""

    size: int
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Args:
        step: training step the checkpoint was taken after.
        score: held-out loss by which the best checkpoint is chosen (lower is better), or None.
        files: every other file of the folder that belongs to the checkpoint.
        metadata: what the run said about itself (config hash, data fingerprint, versions, world size, threads).
    """

    step: int
    score: float | None
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """JSON text that carries its own hash, so that damage to the manifest itself is seen too."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "score": self.score,
            "files": {name: {"size": entry.size, "blake2b": entry.blake2b} for name, entry in self.files.items()},
            "metadata": dict(self.metadata),
        }
        return json.dumps({**body, "blake2b": _hash(body)}, indent=1, allow_nan=False).encode()


def _hash(body: Mapping[str, Any]) -> str:
    return durable.digest_bytes(json.dumps(body, sort_keys=True, allow_nan=False).encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a folder's manifest. Raises ManifestError (NoManifest when there is none) with the reason."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ManifestError(f"{MANIFEST} is {path.stat().st_size} bytes large")
        data: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NoManifest(f"{MANIFEST} is missing{_foreign(folder)}") from None
    except OSError as error:
        raise ManifestError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise NoManifest(f"{MANIFEST} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ManifestError(f"{MANIFEST} is not a JSON object")
    return _decode(data)


def _decode(data: dict[str, Any]) -> Manifest:
    if data.get("format") != FORMAT:
        raise ManifestError(f"{MANIFEST} has format {data.get('format')!r}; this version reads format {FORMAT}")
    claimed = data.pop("blake2b", None)
    try:
        actual = _hash(data)
    except ValueError as error:
        raise ManifestError(f"{MANIFEST} holds what a manifest never does: {error}") from None
    if claimed != actual:
        raise ManifestError(f"{MANIFEST} does not match its own hash")
    try:
        files = {name: FileEntry(entry["size"], entry["blake2b"]) for name, entry in data["files"].items()}
        manifest = Manifest(data["step"], data["score"], files, data["metadata"])
    except (KeyError, TypeError, AttributeError):
        raise ManifestError(f"{MANIFEST} lacks fields") from None
    well_typed = (
        type(manifest.step) is int
        and (manifest.score is None or isinstance(manifest.score, float | int))
        and isinstance(manifest.metadata, dict)
        and all(type(entry.size) is int and isinstance(entry.blake2b, str) for entry in files.values())
    )
    if not well_typed:
        raise ManifestError(f"{MANIFEST} has fields of the wrong kind")
    for name in manifest.files:
        if Path(name).name != name or name == MANIFEST or not name.endswith(ALLOWED_SUFFIXES):
            raise ManifestError(f"{MANIFEST} lists {name!r}; only {' and '.join(ALLOWED_SUFFIXES)} files are read")
    return manifest


def _foreign(folder: Path) -> str:
    """A hint when the folder holds another tool's checkpoint, whose pickles are never opened."""
    pickles = sorted(
        p.name
        for p in folder.iterdir()
        if p.name == ".metadata" or p.suffix in (".pt", ".pth", ".bin", ".pkl", ".distcp")
    )
    return f" ({pickles[0]} is or may hold a pickle, which is never opened)" if pickles else ""


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files a manifest lists: missing, wrong size, wrong hash."""
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file() or path.is_symlink():
                yield f"{name} is missing"
            elif path.stat().st_size != entry.size:
                yield f"{name} has {path.stat().st_size} bytes, not {entry.size}"
            elif durable.digest(path) != entry.blake2b:
                yield f"{name} does not match its hash"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
