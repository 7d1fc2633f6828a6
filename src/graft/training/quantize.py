"""A trained run as a run for inference: two bits per ternary weight, 8 or 4 per number of a memory bank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from graft.errors import CheckpointError
from graft.linears.packing import pack_ternary, ternary_layers
from graft.memories.bank import quantize_banks
from graft.ops.slot_quantization import Bits
from graft.training.checkpoint import CheckpointStore
from graft.training.load import Which, load_run
from graft.training.manifest import read_manifest
from graft.training.run_dir import RunDirectory
from graft.training.saving import EXPERIMENT, WEIGHTS, machine


@dataclass(frozen=True)
class QuantizedRun:
    """What was written.

    Args:
        checkpoint: the packed checkpoint.
        step: training step it was taken after.
        layers: names of the packed layers.
        memory_bits: bits per number of the memory banks; None = they are as they were.
        bytes_before: of the weights read, as fp32.
        bytes_after: of the weights written.
    """

    checkpoint: Path
    step: int
    layers: tuple[str, ...]
    memory_bits: Bits | None
    bytes_before: int
    bytes_after: int


def quantize_run(
    path: Path | str,
    out: Path | str,
    *,
    which: Which = "newest",
    memory_bits: Bits | None = None,
    memory_group_size: int | None = None,
) -> QuantizedRun:
    """Packs the ternary layers of a checkpoint, rounds its memory banks if asked to, and writes it, with config and
    tokenizer, as a run directory of its own.

    What reads runs (`graft.training.load.load_run`, ``graft generate``, ``chat``, ``eval``) reads it like any other;
    it cannot be trained further. Norms, embeddings, head and routers stay as they are.

    Args:
        path: a run directory or a checkpoint's folder.
        out: the new run directory; must not hold anything.
        which: the checkpoint of a run directory.
        memory_bits: per number of the memory banks; None = they stay as they are. Rounding changes what the model
            says, so the result has no score until it is evaluated (`graft eval --memory-bits` tells beforehand).
        memory_group_size: neighbouring channels of a slot that share a scale; None = all of them.

    Raises:
        ConfigError: the model has nothing to pack or round, or its ternary layers are not fully quantised yet.
        CheckpointError: ``path`` cannot be read, or ``out`` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("it already holds something", where=str(out), fix="name a folder that is new or empty")
    run = load_run(path, which=which)
    before = _num_bytes(run.model.state_dict().values())
    layers = pack_ternary(run.model) if ternary_layers(run.model) or memory_bits is None else []
    if memory_bits is not None:
        quantize_banks(run.model, memory_bits, memory_group_size)
    weights = run.model.state_dict()
    target = RunDirectory(out)
    target.tokenizer.parent.mkdir(parents=True, exist_ok=True)
    run.tokenizer.save(target.tokenizer)
    manifest = read_manifest(run.checkpoint)
    checkpoint = CheckpointStore(target.checkpoints).save(
        run.step,
        {WEIGHTS: weights},
        {EXPERIMENT: run.experiment.to_dict()},
        {**manifest.metadata, **machine()},
        score=manifest.score if memory_bits is None else None,
    )
    return QuantizedRun(checkpoint, run.step, tuple(layers), memory_bits, before, _num_bytes(weights.values()))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
