"""Stores and verifies named tensors and JSON documents so that a crash, a full disk or a flipped bit never costs a run.

Knows nothing of models. One checkpoint is one folder::

    checkpoints/
      step-00000100/            model.safetensors, optimizer.safetensors, run.json, …, manifest.json
      step-00000200.tmp-<id>/   being written (or being deleted) by the process <id>
      step-00000150.corrupt/    set aside because it failed verification, with reason.txt
      step-00000300.abandoned/  set aside because the run went back to an earlier step
      latest                    the newest one's name, for people; loading scans the folders

Saving: write the files into the ``tmp`` folder, synchronise each, write the manifest (size and hash of every file)
last, synchronise, rename, synchronise the parent; only then ``latest`` is rewritten and old checkpoints are pruned.
Loading: every file's hash is verified; a checkpoint that fails is set aside and the next older one is used.
Only safetensors and JSON are ever opened.

Fail-points (`graft.faults`): ``checkpoint.file.K`` (K files written), ``checkpoint.manifest`` (before the rename),
``checkpoint.rename`` (before ``latest``), ``checkpoint.latest`` (before pruning), ``checkpoint.prune`` (before each
removal), ``checkpoint.removing`` (renamed away, not yet deleted).
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from graft.errors import CheckpointError
from graft.faults import fault_point
from graft.training import durable
from graft.training.checkpoint_reader import (
    Checkpoint,
    Loaded,
    Unusable,
    read_checkpoint,
    read_or_fail,
    verified_manifest,
    verify_checkpoint,
)
from graft.training.checkpoint_writer import write_folder
from graft.training.lock import Process
from graft.training.manifest import MANIFEST, Manifest

logger = logging.getLogger(__name__)

LATEST = "latest"
REASON = "reason.txt"
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")
_TEMPORARY = re.compile(r".+\.tmp-(?P<host>.+)-(?P<pid>\d+)-(?P<born>\d+)")

Report = Callable[[str, Mapping[str, Any]], None]
"""Receives what happened: the event's kind and its fields (see `graft.training.metrics.EventsLog.write`)."""


def _no_report(_kind: str, _fields: Mapping[str, Any]) -> None:
    """The report of a store that nobody listens to; warnings are logged all the same."""


class SaveFailed(Exception):
    """A save did not come about (usually a full disk); everything saved before is untouched. The run may go on.

    Args:
        step: the step that was to be saved.
        reason: the operating system's words.
    """

    def __init__(self, step: int, reason: str):
        self.step = step
        self.reason = reason
        super().__init__(f"checkpoint of step {step} could not be saved: {reason}")


class CheckpointStore:
    """The checkpoints of one run. One process writes at a time: the caller holds the run directory's lock.

    Args:
        folder: where the checkpoints are; made at the first save.
        keep_last: valid checkpoints kept, newest first (at least 1).
        keep_best: valid checkpoints kept by lowest score; one may be both among the newest and the best.
        report: is told of ``checkpoint_quarantined``, ``checkpoint_skipped``, ``checkpoint_pruned``,
            ``checkpoint_abandoned``, ``latest_stale`` and ``checkpoint_warning``. Warnings are also logged.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1, report: Report | None = None):
        assert keep_last >= 1, "the newest checkpoint is always kept"
        assert keep_best >= 0
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._report: Report = report or _no_report
        self._whole: dict[Path, tuple[Any, Manifest]] = {}

    # ---------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Mapping[str, Any]],
        metadata: Mapping[str, Any],
        *,
        score: float | None = None,
    ) -> Path:
        """Saves one checkpoint under the save protocol, then rewrites ``latest`` and prunes.

        Args:
            step: training step, counted from 1; the folder's name.
            tensors: file stem -> named tensors. Each must be given once (tied weights under one name).
            documents: file stem -> JSON object (finite numbers only; see `graft.training.state.flatten_state`).
            metadata: goes into the manifest: config hash, data fingerprint, versions, world size, threads.
            score: held-out loss, lower is better; None or a non-finite one never makes a checkpoint the best.

        Returns:
            the checkpoint's folder.

        Raises:
            SaveFailed: the disk is full or cannot be written; what was written is removed again.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self._temporary(final)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_tree(temporary)
            write_folder(temporary, step, tensors, documents, metadata, score)
            fault_point("checkpoint.manifest", step, path=temporary / MANIFEST)
            self._publish(temporary, final, step)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise SaveFailed(step, error.strerror or str(error)) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._after_save(final, step)
        return final

    def _temporary(self, final: Path) -> Path:
        me = Process.current()
        return final.with_name(f"{final.name}.tmp-{_file_name(me.host)}-{me.pid}-{me.born}")

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        """Gives the finished folder its name. An older checkpoint of the same step stays loadable until then."""
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            problems = verify_checkpoint(final)
            if problems:
                self._set_aside(final, "corrupt", problems[0])
                self._warn("checkpoint_quarantined", final, problems[0])
            else:
                _remove_tree(replaced)
                final.rename(replaced)
        temporary.rename(final)
        fault_point("checkpoint.rename", step)
        durable.sync_folder(self.folder)
        _remove_tree(replaced)

    def _after_save(self, final: Path, step: int) -> None:
        """What may fail without making the save a failure: the checkpoint is already found by every scan."""
        try:
            durable.replace(self.folder / LATEST, f"{final.name}\n".encode())
            fault_point("checkpoint.latest", step)
            self.prune()
        except OSError as error:
            self._warn("checkpoint_warning", final, f"saved, but tidying up failed: {error}")

    # ---------------------------------------------------------------- loading

    def load(self, which: Path | Literal["auto"] = "auto") -> Loaded | None:
        """Verifies and reads a checkpoint.

        Args:
            which: a checkpoint's folder, or ``auto``: the newest that is whole. ``auto`` sets damaged ones aside.

        Returns:
            None only for ``auto`` where no checkpoint was ever finished: a fresh start loses nothing.

        Raises:
            CheckpointError: the named one is damaged, or ``auto`` found checkpoints and not one is whole.
        """
        if which != "auto":
            return read_checkpoint(Path(which))
        reasons: dict[str, str] = {}
        for folder, step in reversed(self._candidates()):
            try:
                loaded = read_or_fail(folder)
                if loaded.step != step:
                    raise Unusable([f"{MANIFEST} is of step {loaded.step}"], damaged=True)
            except Unusable as error:
                reasons[folder.name] = str(error)
                self._reject(folder, error)
                continue
            self._check_latest(folder)
            return loaded
        self._refuse_fresh_start(reasons)
        return None

    def list_valid(self) -> list[Checkpoint]:
        """Every checkpoint that passes verification, oldest first. Changes nothing on the disk."""
        found = ((folder, step, self._manifest_if_whole(folder)) for folder, step in self._candidates())
        return [Checkpoint(folder, manifest) for folder, step, manifest in found if manifest and manifest.step == step]

    def latest(self) -> Path | None:
        """The newest checkpoint that passes verification."""
        for folder, step in reversed(self._candidates()):
            manifest = self._manifest_if_whole(folder)
            if manifest and manifest.step == step:
                return folder
        return None

    def best(self) -> Path | None:
        """The valid checkpoint with the lowest score, the newest of equals; None when none has a score."""
        ranked = _by_score(self.list_valid())
        return ranked[0].path if ranked else None

    # ---------------------------------------------------------------- keeping order

    def prune(self) -> list[Path]:
        """Removes valid checkpoints that are neither among the newest nor the best; returns what was removed.

        Damaged ones count for nothing. The kept ones have been read back and matched before anything is removed.
        """
        valid = self.list_valid()
        kept = {c.path for c in (*valid[-self.keep_last :], *_by_score(valid)[: self.keep_best])}
        removed = [c for c in valid if c.path not in kept]
        for checkpoint in removed:
            fault_point("checkpoint.prune", valid[-1].step)
            # renamed first: a half-deleted folder must never look like a damaged checkpoint
            doomed = self._temporary(checkpoint.path)
            _remove_tree(doomed)
            checkpoint.path.rename(doomed)
            fault_point("checkpoint.removing", valid[-1].step)
            shutil.rmtree(doomed)
            self._report("checkpoint_pruned", {"checkpoint": checkpoint.path.name})
        return [c.path for c in removed]

    def sweep(self) -> list[Path]:
        """Removes what dead processes left half-written or half-deleted; returns it. Call it once the run is locked.

        A folder of a process that still runs on this machine stays. One of another machine goes: the run's lock says
        that nobody else is writing.
        """
        removed: list[Path] = []
        if not self.folder.is_dir():
            return removed
        for path in sorted(self.folder.glob("*.tmp-*")):
            if not _writer_lives(path.name):
                _remove_tree(path)
                removed.append(path)
        for replaced in sorted(self.folder.glob("step-*.replaced")):
            final = replaced.with_name(replaced.name.removesuffix(".replaced"))
            if final.exists():
                _remove_tree(replaced)
                removed.append(replaced)
            else:
                replaced.rename(final)
        return removed

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames every checkpoint later than ``step`` to ``….abandoned``; returns the new names.

        For a run that deliberately goes back: the steps it left must neither be resumed from nor push out the ones it
        is about to save.
        """
        later = [folder for folder, number in self._candidates() if number > step]
        moved = [self._set_aside(folder, "abandoned", f"the run went back to step {step}") for folder in later]
        for path in moved:
            self._report("checkpoint_abandoned", {"checkpoint": path.name})
        return moved

    # ---------------------------------------------------------------- inside

    def _candidates(self) -> list[tuple[Path, int]]:
        """Folders that are named like checkpoints, with their step, oldest first."""
        if not self.folder.is_dir():
            return []
        found: list[tuple[Path, int]] = []
        for path in self.folder.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and path.is_dir() and not (match[2] and path.with_name(f"step-{match[1]}").exists()):
                found.append((path, int(match[1])))
        return sorted(found, key=lambda item: item[1])

    def _manifest_if_whole(self, folder: Path) -> Manifest | None:
        """The manifest if the folder passes verification. Hashes a file again only after it changed."""
        try:
            signature = sorted((p.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in _stats(folder))
            known = self._whole.get(folder)
            if known is None or known[0] != signature:
                known = self._whole[folder] = (signature, verified_manifest(folder))
        except (OSError, Unusable):
            self._whole.pop(folder, None)
            return None
        return known[1]

    def _reject(self, folder: Path, error: Unusable) -> None:
        if not error.damaged:
            self._warn("checkpoint_skipped", folder, str(error))
            return
        try:
            self._set_aside(folder, "corrupt", str(error))
        except OSError as failure:
            self._warn("checkpoint_skipped", folder, f"{error} (and it cannot be set aside: {failure.strerror})")
            return
        self._warn("checkpoint_quarantined", folder, str(error))

    def _set_aside(self, folder: Path, suffix: str, reason: str) -> Path:
        base = folder.name.removesuffix(".replaced")
        target, count = self.folder / f"{base}.{suffix}", 1
        while target.exists():
            count += 1
            target = self.folder / f"{base}.{suffix}-{count}"
        folder.rename(target)
        with contextlib.suppress(OSError):  # the reason is a courtesy; a full disk must not stop the search
            durable.replace(target / REASON, f"{reason}\n".encode())
        return target

    def _warn(self, kind: str, folder: Path, reason: str) -> None:
        logger.warning("%s: %s", folder, reason)
        self._report(kind, {"checkpoint": folder.name, "reason": reason})

    def _check_latest(self, loaded: Path) -> None:
        try:
            named = (self.folder / LATEST).read_text(errors="replace").strip()
        except OSError:
            named = ""
        if named != loaded.name:
            self._report("latest_stale", {"latest": named, "checkpoint": loaded.name})

    def _refuse_fresh_start(self, reasons: dict[str, str]) -> None:
        """Raises if there ever was a checkpoint: training from scratch in its place would be a silent loss."""
        for folder in sorted(self.folder.glob("step-*.corrupt*")):
            if not any(folder.name.startswith(name) for name in reasons):
                reasons[folder.name] = _recorded_reason(folder)
        if not reasons and (self.folder / LATEST).exists():
            reasons[LATEST] = "names a checkpoint, and there is none"
        if reasons:
            raise CheckpointError(
                "no checkpoint can be loaded: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()),
                where=str(self.folder),
                fix="restore one from a copy, or start again in another run directory (or move this folder away)",
            )


def _by_score(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    scored = ((c.score, -c.step, c) for c in checkpoints if c.score is not None)
    return [c for _, _, c in sorted(scored, key=lambda item: item[:2])]


def _stats(folder: Path) -> list[tuple[Path, Any]]:
    return [(path, path.stat()) for path in folder.iterdir()]


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _file_name(host: str) -> str:
    return re.sub(r"[^\w.\-]", "_", host)


def _writer_lives(name: str) -> bool:
    match = _TEMPORARY.fullmatch(name)
    me = Process.current()
    if match is None or match["host"] != _file_name(me.host):
        return False
    return Process(me.host, int(match["pid"]), int(match["born"])).may_live()


def _recorded_reason(folder: Path) -> str:
    try:
        return (folder / REASON).read_text(errors="replace").strip()
    except OSError:
        return "set aside earlier as damaged"
