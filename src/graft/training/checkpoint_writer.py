"""Writes one checkpoint folder: every file synchronised, the manifest last."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graft.faults import fault_point
from graft.training import durable
from graft.training.manifest import MANIFEST, FileEntry, Manifest
from graft.training.tensor_files import write_tensors


def write_folder(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    score: float | None,
) -> None:
    """Makes ``folder`` and fills it; on return all of it is on the disk. See `CheckpointStore.save` for the arguments.

    Raises:
        OSError: the disk is full or cannot be written; what was written so far is still there.
    """
    folder.mkdir()
    files = _write_files(folder, step, tensors, documents)
    usable_score = score if score is not None and math.isfinite(score) else None
    durable.write_new(folder / MANIFEST, Manifest(step, usable_score, files, metadata).to_bytes())
    durable.sync_folder(folder)


def _write_files(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
) -> dict[str, FileEntry]:
    assert MANIFEST not in {f"{stem}.json" for stem in documents}, "the manifest is not the caller's to write"
    files: dict[str, FileEntry] = {}

    def written(path: Path) -> None:
        files[path.name] = FileEntry(path.stat().st_size, durable.digest(path))
        fault_point(f"checkpoint.file.{len(files)}", step, path=path)

    fault_point("checkpoint.file.0", step)
    for stem, named in tensors.items():
        path = folder / f"{stem}.safetensors"
        write_tensors(path, named)
        durable.sync_file(path)
        written(path)
    for stem, document in documents.items():
        path = folder / f"{stem}.json"
        durable.write_new(path, json.dumps(document, allow_nan=False).encode())
        written(path)
    return files
