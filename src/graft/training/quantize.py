"""A trained run with ternary layers as a run for inference, two bits per ternary weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from graft.errors import CheckpointError
from graft.linears.packing import pack_ternary
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
        bytes_before: of the weights read, as fp32.
        bytes_after: of the weights written.
    """

    checkpoint: Path
    step: int
    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize_run(path: Path | str, out: Path | str, *, which: Which = "newest") -> QuantizedRun:
    """Packs the ternary layers of a checkpoint and writes it, with config and tokenizer, as a run directory of its own.

    What reads runs (`graft.training.load.load_run`, ``graft generate``, ``chat``, ``eval``) reads it like any other;
    it cannot be trained further. Norms, embeddings, head, routers and experts stay as they are.

    Args:
        path: a run directory or a checkpoint's folder.
        out: the new run directory; must not hold anything.
        which: the checkpoint of a run directory.

    Raises:
        ConfigError: the model has no ternary layers, or they are not fully quantised yet.
        CheckpointError: ``path`` cannot be read, or ``out`` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("it already holds something", where=str(out), fix="name a folder that is new or empty")
    run = load_run(path, which=which)
    before = _num_bytes(run.model.state_dict().values())
    layers = pack_ternary(run.model)
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
        score=manifest.score,
    )
    return QuantizedRun(checkpoint, run.step, tuple(layers), before, _num_bytes(weights.values()))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
