"""Continuing a run: which checkpoint, whether it belongs to this config and data, and what changed since.

The policy is: the *config wins*. Learning rate, schedule, batch sizes and everything else come from the config that is
given now, and every difference to the checkpoint's config is printed and written to ``events.jsonl``. What cannot be
combined is refused: weights that do not fit the model, the state of another kind of optimizer, other data (unless
allowed).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from graft.config.experiment import SEMANTIC_FIELDS, Experiment
from graft.config.identity import config_diff
from graft.errors import CheckpointError, ConfigError, DataError
from graft.training.checkpoint import Loaded
from graft.training.recorder import Notices
from graft.training.run import Run
from graft.training.saving import EXPERIMENT, WEIGHTS, machine, unpack
from graft.training.tensor_files import require_same_tensors

Resume = Literal["never", "auto"] | Path
"""never: start, and refuse a directory that holds a run; auto: continue if there is one; or a checkpoint's folder."""

Change = tuple[str, Any, Any]
"""Dotted path of a field, its value in the checkpoint's config, its value now."""

ORDER_FIELDS = ("data.seq_len", "data.packing", "seed")
"""Fields that decide which rows come in which order: a position in the old order means nothing in another."""


def parse_resume(text: str) -> Resume:
    """Reads the value of ``--resume``. Raises ConfigError when it is neither a word nor an existing folder."""
    if text == "never" or text == "auto":
        return text
    if not Path(text).is_dir():
        raise ConfigError(
            f"'{text}' is no checkpoint folder", where="--resume", expected="auto, never or the path of a checkpoint"
        )
    return Path(text)


def restore_run(run: Run, loaded: Loaded, notices: Notices, *, allow_data_change: bool) -> None:
    """Puts a checkpoint's state into a freshly built run, after checking that it belongs to it.

    Args:
        run: built from the config that is given now.
        loaded: the checkpoint.
        notices: is told of every difference.
        allow_data_change: accept other data than the checkpoint's; its data position then means nothing and the new
            data is read from its start.

    Raises:
        DataError: the data is not the checkpoint's, and that is not allowed.
        CheckpointError: the weights do not fit the model, or the optimizer is of another kind.
    """
    _check_belongs(run, loaded)
    same_data = loaded.manifest.metadata["data_fingerprint"] == run.prepared.fingerprint
    if not same_data and not allow_data_change:
        raise DataError(
            "the documents, how they are split or the tokenizer are not what the checkpoint was trained on",
            where=str(loaded.path),
            expected=f"data with the fingerprint {loaded.manifest.metadata['data_fingerprint']}",
            fix="restore the data, or pass --allow-data-change to go on with the new data from its start",
        )
    changes = _config_changes(run, loaded)
    _report_config_changes(changes, loaded, notices)
    state = unpack(loaded)
    if not same_data or any(path.startswith(ORDER_FIELDS) for path, _, _ in changes):
        state["data"] = run.loader.state_dict()
        notices.warn(loaded.step, "the rows are not the checkpoint's any more: reading the data from its start")
    _report_machine_changes(loaded, notices)
    run.load_state_dict(state)


def _check_belongs(run: Run, loaded: Loaded) -> None:
    for stem in (WEIGHTS, EXPERIMENT):
        if stem not in loaded.tensors and stem not in loaded.documents:
            raise CheckpointError(
                f"there is no '{stem}' in it", where=str(loaded.path), expected="a training checkpoint"
            )
    require_same_tensors(loaded.tensors[WEIGHTS], run.model.state_dict(), where=str(loaded.path))
    before = loaded.documents[EXPERIMENT]["optimizer"]["type"]
    now = run.experiment.to_dict()["optimizer"]["type"]
    if before != now:
        raise CheckpointError(
            f"the optimizer is {now} and the checkpoint has the state of {before}",
            where="optimizer.type",
            fix=f"set optimizer.type: {before}, or start a new run",
        )
    _check_row_updates(run, loaded)


def _check_row_updates(run: Run, loaded: Loaded) -> None:
    """A table's state belongs to one way of updating it."""
    saved, given = (
        document["optimizer"]["groups"] for document in (loaded.documents[EXPERIMENT], run.experiment.to_dict())
    )
    for role in sorted({*saved, *given}):
        before, now = (groups.get(role, {}).get("update") for groups in (saved, given))
        if before != now:
            raise CheckpointError(
                f"the update is {now} and the checkpoint has the state of {before}",
                where=f"optimizer.groups.{role}.update",
                fix=f"set it to {before or 'null'}, or start a new run",
            )


def _config_changes(run: Run, loaded: Loaded) -> list[Change]:
    """What decides the numbers and is not what it was when the checkpoint was saved."""
    try:
        before = Experiment.model_validate(loaded.documents[EXPERIMENT])
    except ValidationError as error:
        raise CheckpointError(
            f"its config means nothing to this version of graft ({error.error_count()} problems)",
            where=str(loaded.path / f"{EXPERIMENT}.json"),
            fix=f"resume with graft {loaded.manifest.metadata.get('graft')}, or start a new run",
        ) from error
    changes = config_diff(before, run.experiment)
    return [change for change in changes if change[0].split(".")[0] in SEMANTIC_FIELDS]


def _report_config_changes(changes: list[Change], loaded: Loaded, notices: Notices) -> None:
    if not changes:
        return
    for path, old, new in changes:
        notices.console.say(f"config changed since the checkpoint: {path}: {old} -> {new} (the config wins)")
    details = [{"path": path, "checkpoint": old, "config": new} for path, old, new in changes]
    notices.event("config_changed", loaded.step, {"changes": details})


def _report_machine_changes(loaded: Loaded, notices: Notices) -> None:
    saved = loaded.manifest.metadata
    changed = [f"{name} {saved.get(name)} -> {now}" for name, now in machine().items() if saved.get(name) != now]
    if changed:
        notices.warn(loaded.step, f"not bit-exact from here on: {', '.join(changed)} since the checkpoint")
