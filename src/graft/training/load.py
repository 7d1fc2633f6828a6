"""A trained model back from its run directory, for everything that is not training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from graft.config.experiment import Experiment
from graft.config.load import load_experiment_from_dict
from graft.data.tokenizers.base import Tokenizer, load_tokenizer
from graft.errors import CheckpointError
from graft.linears.packing import PACKED_SUFFIX, pack_ternary
from graft.memories.bank import round_as_stored
from graft.model import Model, build_model
from graft.training.checkpoint import CheckpointStore
from graft.training.checkpoint_reader import Loaded, read_checkpoint
from graft.training.manifest import MANIFEST
from graft.training.run_dir import RunDirectory
from graft.training.saving import EXPERIMENT, WEIGHTS
from graft.training.tensor_files import require_same_tensors

Which = Literal["newest", "best"]


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint, ready to use.

    Args:
        experiment: the config it was trained with.
        model: its weights, in evaluation mode.
        tokenizer: the run's.
        checkpoint: the folder it came from.
        step: training step it was taken after.
    """

    experiment: Experiment
    model: Model
    tokenizer: Tokenizer
    checkpoint: Path
    step: int


def find_checkpoint(path: Path, which: Which = "newest") -> Path:
    """The checkpoint that ``path`` means: itself, or the newest or best valid one of a run directory.

    Nothing is changed on the disk: a damaged checkpoint is passed over, not set aside (its run may be training).

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    folder = RunDirectory(path).checkpoints
    if not folder.is_dir():
        raise CheckpointError(
            "this is neither a run directory nor a checkpoint" if path.exists() else "there is nothing here",
            where=str(path),
            expected="the directory that 'graft train' printed, or one of its checkpoints/step-…",
        )
    store = CheckpointStore(folder)
    found = store.latest() if which == "newest" else store.best()
    if found is None:
        raise CheckpointError(
            "no valid checkpoint" if which == "newest" else "no valid checkpoint with a held-out loss",
            where=str(folder),
            fix="train on until the first save" if which == "newest" else "use the newest one",
        )
    return found


def load_run(
    path: Path | str,
    *,
    which: Which = "newest",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedRun:
    """Reads a model, its config and its tokenizer from a run directory or from one checkpoint in it.

    Args:
        path: a run directory, or a checkpoint's folder.
        which: the newest valid checkpoint, or the one with the lowest held-out loss.
        device: where the weights go.
        dtype: of the weights; the checkpoint keeps fp32. Counts and packed weights are whole numbers whatever it is.

    Raises:
        CheckpointError: no checkpoint can be read, or its tensors do not fit its config.
        DataError: the run's tokenizer is missing or damaged.
    """
    loaded = read_checkpoint(find_checkpoint(Path(path), which))
    experiment = load_experiment_from_dict(_document(loaded))
    run = RunDirectory(loaded.path.resolve().parent.parent)
    tokenizer = load_tokenizer(run.tokenizer)
    model = build_model(experiment.model, tokenizer.vocab_size, seed=experiment.seed, device="meta")
    weights = loaded.tensors.get(WEIGHTS, {})
    if any(name.endswith(PACKED_SUFFIX) for name in weights):
        pack_ternary(model)
    round_as_stored(model, weights)
    require_same_tensors(weights, model.state_dict(), where=str(loaded.path))
    # the mapped tensors are copied: a file that disappears later must not take the model with it
    model.load_state_dict(
        {
            n: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype, copy=True)
            for n, t in weights.items()
        },
        assign=True,
    )
    model.requires_grad_(False).eval()
    model.set_runtime(kernels=experiment.runtime.kernels, loss_chunk_bytes=experiment.runtime.loss_chunk_bytes)
    return LoadedRun(experiment, model, tokenizer, loaded.path, loaded.step)


def _document(loaded: Loaded) -> dict[str, object]:
    document = loaded.documents.get(EXPERIMENT)
    if document is None:
        raise CheckpointError("it holds no config", where=str(loaded.path), expected=f"{EXPERIMENT}.json")
    return document
