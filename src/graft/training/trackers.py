"""Experiment trackers beside ``metrics.jsonl``: TensorBoard and Weights & Biases. They may fail; training may not."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from graft.config.experiment import Experiment, WandbConfig
from graft.errors import GraftError, missing_extra

Numbers = Mapping[str, float]


class Tracker(Protocol):
    """Where numbers are sent besides the metric log."""

    name: str

    def log(self, step: int, numbers: Numbers) -> None:
        """Records named numbers at a step."""
        ...

    def close(self) -> None:
        """Flushes and ends."""
        ...


def _optional(module: str, package: str, purpose: str) -> Any:
    """Imports an optional package. Raises ResourceError naming the extra when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(package, "track", purpose) from error


class TensorBoardTracker:
    """Event files in ``run_dir/tensorboard``."""

    name = "TensorBoard"

    def __init__(self, folder: Path):
        module = _optional("torch.utils.tensorboard", "tensorboard", "logging.tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _kept_id(file: Path) -> str:
    kept = file.read_text() if file.exists() else ""  # empty: the process died between making and writing it
    if not kept:
        kept = secrets.token_hex(4)
        file.write_text(kept)
    return kept


class WandbTracker:
    """A Weights & Biases run named after the run directory; a resumed run continues it under the same id.

    The id is drawn once and kept in ``run_dir/wandb_id``: directories of one name may stand in several places.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: WandbConfig, experiment: Experiment):
        wandb = _optional("wandb", "wandb", "logging.wandb")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags),
            mode=config.mode,
            dir=str(folder),
            name=folder.name,
            id=_kept_id(folder / "wandb_id"),
            resume="allow" if config.mode == "online" else None,
            config=experiment.to_dict(),
            settings=wandb.Settings(silent=True, disable_git=True, disable_code=True),
        )

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run. Whatever one raises becomes one warning, and that tracker is dropped.

    Args:
        makers: functions that open a tracker. A `GraftError` they raise (a package is not installed) is raised on:
            it happens before the first step and a person can act on it. Anything else is a warning.
        warn: called with the text of a warning.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], None]):
        self._warn = warn
        self._open: list[Tracker] = []
        for name, make in makers.items():
            try:
                self._open.append(make())
            except GraftError:
                raise
            except Exception as error:
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._warn(f"{name} failed and gets no more numbers of this run: {type(error).__name__}: {error}")

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._open):
            try:
                action(tracker)
            except Exception as error:
                self._open.remove(tracker)
                self._give_up(tracker.name, error)

    def log(self, step: int, numbers: Numbers) -> None:
        """Sends named numbers to every tracker that still works."""
        self._each(lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Ends every tracker that still works."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()


def open_trackers(experiment: Experiment, folder: Path, warn: Callable[[str], None]) -> Trackers:
    """The trackers the config asks for. Raises ResourceError when one's package is not installed."""
    logging = experiment.logging
    makers: dict[str, Callable[[], Tracker]] = {}
    if logging.tensorboard:
        makers[TensorBoardTracker.name] = lambda: TensorBoardTracker(folder)
    wandb = logging.wandb
    if wandb is not None:
        makers[WandbTracker.name] = lambda: WandbTracker(folder, wandb, experiment)
    return Trackers(makers, warn)
