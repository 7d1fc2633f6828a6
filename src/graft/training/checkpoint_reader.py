"""Verifies and reads one checkpoint folder: only safetensors and JSON are ever opened, after their hashes matched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.errors import CheckpointError
from graft.training.manifest import Manifest, ManifestError, NoManifest, file_problems, read_manifest
from graft.training.tensor_files import header_problem, read_tensors


class Unusable(Exception):
    """Why a folder cannot be loaded; ``damaged`` when it is one of our checkpoints, broken."""

    def __init__(self, problems: Iterable[str], *, damaged: bool):
        self.damaged = damaged
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed verification."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Training step it was taken after."""
        return self.manifest.step

    @property
    def score(self) -> float | None:
        """Held-out loss at that step, if one was known."""
        return self.manifest.score


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's content.

    Args:
        path: its folder.
        step: training step it was taken after.
        tensors: file stem -> tensor name -> tensor, on the CPU, mapped from the file (read on first use).
        documents: file stem -> JSON object.
        manifest: sizes, hashes and what the run said about itself (``manifest.metadata``).
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    documents: Mapping[str, dict[str, Any]]
    manifest: Manifest


def verify_checkpoint(folder: Path) -> list[str]:
    """Everything wrong with a checkpoint folder, as sentences; empty when it can be loaded."""
    try:
        verified_manifest(folder)
    except Unusable as error:
        return [str(error)]
    return []


def read_checkpoint(folder: Path) -> Loaded:
    """Verifies and reads the checkpoint that the caller named.

    Raises:
        CheckpointError: it is not one, or is damaged. There is no fallback to another: the caller meant this one.
    """
    if not folder.is_dir():
        problem = "is a file, and a checkpoint is a folder" if folder.exists() else "there is no such checkpoint"
        raise CheckpointError(problem, where=str(folder), expected="a folder step-… with a manifest.json")
    try:
        return read_or_fail(folder)
    except Unusable as error:
        raise CheckpointError(
            f"cannot be loaded: {error}",
            where=str(folder),
            fix="name another checkpoint, or resume with auto to use the newest that is whole",
        ) from None


def verified_manifest(folder: Path) -> Manifest:
    """Verifies every file without reading tensors. Raises Unusable."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise Unusable([str(error)], damaged=not isinstance(error, NoManifest)) from None
    problems = list(file_problems(folder, manifest))
    if not problems:
        # a matching hash says the file is the one that was saved, not that it is harmless
        stored = (folder / name for name in manifest.files if name.endswith(".safetensors"))
        problems = [problem for problem in map(header_problem, stored) if problem]
    if problems:
        raise Unusable(problems, damaged=True)
    return manifest


def read_or_fail(folder: Path) -> Loaded:
    """Verifies and reads. Raises Unusable."""
    manifest = verified_manifest(folder)
    tensors: dict[str, Mapping[str, Tensor]] = {}
    documents: dict[str, dict[str, Any]] = {}
    for name in manifest.files:
        path = folder / name
        try:
            if path.suffix == ".json":
                documents[path.stem] = _read_document(path)
            else:
                tensors[path.stem] = read_tensors(path)
        except (OSError, ValueError, RecursionError) as error:
            raise Unusable([f"{name}: {error}"], damaged=True) from None
    return Loaded(folder, manifest.step, tensors, documents, manifest)


def _read_document(path: Path) -> dict[str, Any]:
    document: Any = json.loads(path.read_bytes())
    if not isinstance(document, dict):
        raise ValueError("is not a JSON object")
    return document
