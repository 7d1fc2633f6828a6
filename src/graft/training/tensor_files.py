"""Named tensors in safetensors files, written so that they can be trusted and read so that they cannot hurt."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.errors import CheckpointError

_MAX_HEADER_BYTES = 100 * 2**20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes named tensors (any device, any strides; dtype and shape are kept).

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    assert "__metadata__" not in tensors, "safetensors keeps the name __metadata__ for itself"
    packed: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()  # views of one storage (a split weight) are refused otherwise
        storages.add(plain.untyped_storage().data_ptr())
        packed[name] = plain
    try:
        save_file(packed, path)
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error


def header_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file's header length, found by reading 8 bytes; None when it may be opened."""
    size = path.stat().st_size
    if size < 8:
        return f"{path.name} is {size} bytes long, which is no safetensors file"
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    if header > min(size - 8, _MAX_HEADER_BYTES):
        return f"{path.name} is no safetensors file: it claims a header of {header} bytes and has {size}"
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a file, on the CPU, mapped from the disk and read on first use.

    Raises:
        ValueError: it is no valid safetensors file.
    """
    problem = header_problem(path)
    if problem:
        raise ValueError(problem)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path.name} is no valid safetensors file: {error}") from None


@dataclass(frozen=True)
class TensorDifferences:
    """How stored tensors differ from those a model expects; each entry is one line for a person."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def describe(self) -> str:
        """All differences, by kind."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("mis-shaped", self.misshaped))
        return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds if names)


def compare_tensors(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> TensorDifferences:
    """Compares names and shapes (meta tensors will do); dtypes may differ."""

    def entry(name: str, tensor: Tensor) -> str:
        return f"{name} {_shape(tensor)}"

    return TensorDifferences(
        missing=tuple(entry(n, t) for n, t in expected.items() if n not in stored),
        unexpected=tuple(entry(n, t) for n, t in stored.items() if n not in expected),
        misshaped=tuple(
            f"{n} is {_shape(stored[n])}, expected {_shape(t)}"
            for n, t in expected.items()
            if n in stored and stored[n].shape != t.shape
        ),
    )


def require_same_tensors(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str) -> None:
    """Raises CheckpointError that lists every missing, unexpected and mis-shaped tensor."""
    differences = compare_tensors(stored, expected)
    if differences:
        raise CheckpointError(
            f"the stored tensors do not fit the model ({differences.describe()})",
            where=where,
            expected="the architecture the checkpoint was trained with",
            fix="use the config.resolved.yaml of that run, or start a new run",
        )


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"
