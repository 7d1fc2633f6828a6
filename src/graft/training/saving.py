"""A run's state in and out of checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graft.config.identity import semantic_hash
from graft.errors import DivergedError, ResourceError
from graft.training.checkpoint import CheckpointStore, Loaded, SaveFailed
from graft.training.guard import non_finite_parameters
from graft.training.recorder import Recorder
from graft.training.run import Run
from graft.training.state import flatten_state, unflatten_state

WEIGHTS = "model"
"""File stem of the weights, each under its parameter's name; every other stem is the state of one component."""

EXPERIMENT = "experiment"
"""File stem of the config the checkpoint was trained with."""


def machine() -> dict[str, Any]:
    """What bit-exact repetition depends on besides the config: versions and threads."""
    return {
        "graft": version("graft"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def checkpoint_metadata(run: Run) -> dict[str, Any]:
    """What a checkpoint's manifest says about the run."""
    return {
        **machine(),
        **run.marks,
        "config_hash": semantic_hash(run.experiment),
        "data_fingerprint": run.prepared.fingerprint,
        "device": run.device.type,
        "world_size": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
    }


def pack(run: Run) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Mapping[str, Any]]]:
    """The run's state as named tensors and JSON documents by file stem."""
    tensors: dict[str, Mapping[str, Tensor]] = {}
    documents: dict[str, Mapping[str, Any]] = {EXPERIMENT: run.experiment.to_dict()}
    for stem, state in run.state_dict().items():
        if stem == WEIGHTS:
            tensors[stem] = state
            continue
        flat, documents[stem] = flatten_state(state)
        if flat:
            tensors[stem] = flat
    return tensors, documents


def unpack(loaded: Loaded) -> dict[str, Any]:
    """The state that `pack` stored, as `Run.load_state_dict` takes it."""
    state: dict[str, Any] = {WEIGHTS: loaded.tensors[WEIGHTS]}
    for stem, document in loaded.documents.items():
        if stem != EXPERIMENT:
            state[stem] = unflatten_state(loaded.tensors.get(stem, {}), document)
    return state


class Checkpoints:
    """Saves a run and gets it back.

    Args:
        store: the files.
        recorder: events of saves and failed saves.
        max_failed_saves: failures in a row before the run stops.
        on_saved: called with the step of every save that came about.
    """

    def __init__(
        self,
        store: CheckpointStore,
        recorder: Recorder,
        *,
        max_failed_saves: int,
        on_saved: Callable[[int], object],
    ):
        self._store = store
        self._recorder = recorder
        self._max_failed = max_failed_saves
        self._on_saved = on_saved
        self._failed = 0
        self._saved_step: int | None = None

    def save(self, run: Run, *, required: bool = False) -> None:
        """Saves the run as it is, once per step. A full disk is an event; the next interval tries again.

        Args:
            run: what to save; its newest evaluation is the checkpoint's score if it is of this step.
            required: this is the last chance (the run ends here).

        Raises:
            DivergedError: a parameter is not finite: such a state is never saved as good.
            ResourceError: the save failed, and it was required or the last of ``max_failed_saves`` in a row.
        """
        if self._saved_step == run.step:
            return
        broken = non_finite_parameters(run.model)
        if broken:
            raise DivergedError(
                f"{len(broken)} parameters are not finite, the first is {broken[0]}; the run is not saved",
                where=f"step {run.step}",
                fix="resume from the last checkpoint with a lower optimizer.learning_rate",
            )
        tensors, documents = pack(run)
        try:
            path = self._store.save(run.step, tensors, documents, checkpoint_metadata(run), score=run.score)
        except SaveFailed as error:
            self._failed += 1
            self._recorder.event("save_failed", run.step, {"reason": error.reason, "in_a_row": self._failed})
            self._recorder.console.warn(f"{error} ({self._failed} in a row)")
            if required or self._failed >= self._max_failed:
                raise self._no_space(error, run) from error
            return
        self._failed, self._saved_step = 0, run.step
        self._recorder.event("saved", run.step, {"checkpoint": path.name, "score": run.score})
        self._on_saved(run.step)

    def _no_space(self, error: SaveFailed, run: Run) -> ResourceError:
        newest = self._store.latest()
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
        return ResourceError(
            f"{error.reason}: {self._failed} saves in a row failed; {kept}",
            where=f"checkpoint of step {run.step}",
            fix="free disk space (or name another place with --out), then resume",
        )

    def any_valid(self) -> bool:
        """There is a checkpoint that can be loaded."""
        return self._store.latest() is not None

    def restore(self, run: Run) -> None:
        """Puts the newest valid checkpoint's state into ``run``."""
        loaded = self._store.load()
        assert loaded is not None, "the caller checked that there is a checkpoint"
        run.load_state_dict(unpack(loaded))
        self._saved_step = run.step
