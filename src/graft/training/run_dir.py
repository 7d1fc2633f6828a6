"""The run directory: one folder with everything a run reads back and everything a person wants to see of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from graft.errors import ResourceError
from graft.training import durable
from graft.training.lock import RunLock

logger = logging.getLogger(__name__)

RunState = Literal["running", "done", "preempted", "interrupted", "diverged", "failed"]

_FOLDERS = ("checkpoints", "tokenizer")
_PACKAGES = ("graft", "torch", "numpy", "safetensors", "tokenizers", "pydantic")
_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "GRAFT_FAULT")
_GIT_SECONDS = 5.0


@dataclass(frozen=True)
class Status:
    """The content of ``status.json``: how the run stands, for launchers that flatten exit codes.

    Args:
        state: what the run is doing or how it ended.
        step: training steps done.
        reason: one sentence; why it ended.
        resumable: whether the same command continues it.
        exit_code: what the process ends with; None while it runs.
    """

    state: RunState
    step: int
    reason: str
    resumable: bool
    exit_code: int | None = None


class RunDirectory:
    """Paths and small files of one run. Making the object touches nothing: `open` is for the process that trains.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._lock = RunLock(self.file("lock"))

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Makes the layout and takes the lock; `close` (or ``with``) gives the lock up.

        The folder and its parent are made where needed, not the parent's parent: that is a misspelt path or a disk
        that is not mounted.

        Raises:
            ResourceError: the place is missing, read-only or full, or another process trains there.
        """
        run = cls(path)
        run._make()
        run._lock.acquire()
        run._sweep()
        return run

    def file(self, *parts: str) -> Path:
        """A path inside the run directory."""
        return self.path.joinpath(*parts)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.file("checkpoints")

    @property
    def tokenizer(self) -> Path:
        """Folder of the run's tokenizer."""
        return self.file("tokenizer")

    @property
    def metrics(self) -> Path:
        """Path of the metric lines."""
        return self.file("metrics.jsonl")

    @property
    def events(self) -> Path:
        """Path of the event lines."""
        return self.file("events.jsonl")

    def write_config(self, given: str, resolved: str) -> None:
        """Writes ``config.yaml`` (the text as given) and ``config.resolved.yaml`` (every value written out).

        Raises ResourceError.
        """
        self._write("config.yaml", given)
        self._write("config.resolved.yaml", resolved)

    def write_environment(self, runtime: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes `environment` to ``env.json`` and returns it. Raises ResourceError.

        Args:
            runtime: what was decided about how the run computes (device, kernels, precision), kept beside it.
        """
        facts = {**environment(), **({"runtime": dict(runtime)} if runtime else {})}
        self._write("env.json", json.dumps(facts, indent=1) + "\n")
        return facts

    def write_status(
        self, state: RunState, step: int, reason: str = "", *, resumable: bool, exit_code: int | None = None
    ) -> bool:
        """Replaces ``status.json`` in one step. A disk that refuses it costs a warning, not the run: returns False."""
        assert state in get_args(RunState), state
        status = Status(state, step, reason, resumable, exit_code)
        record = {**asdict(status), "pid": os.getpid(), "host": socket.gethostname(), "time": {"unix": time.time()}}
        try:
            durable.replace(self.file("status.json"), (json.dumps(record, indent=1) + "\n").encode())
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.file("status.json"), error.strerror)
            return False
        return True

    def read_status(self) -> Status | None:
        """The last status written, or None where there is none that can be read."""
        try:
            record: Any = json.loads(self.file("status.json").read_bytes())
            return Status(**{name: record[name] for name in Status.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        home = self.path.absolute().parent
        if not home.parent.is_dir():
            raise ResourceError(
                f"the folder {home.parent} does not exist",
                where=str(self.path),
                expected="an output directory below an existing folder",
                fix="create it, mount the disk, or set runtime.output_dir",
            )
        try:
            home.mkdir(exist_ok=True)
            self.path.mkdir(exist_ok=True)
            for name in _FOLDERS:
                self.file(name).mkdir(exist_ok=True)
            self._probe()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _sweep(self) -> None:
        """Removes half-written small files of a process that was killed; the lock says that nobody is writing now."""
        for path in self.path.glob("*.tmp-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _probe(self) -> None:
        """Writes for real: permission bits say nothing about a read-only or a full disk."""
        probe = self.file(f"probe.tmp-{os.getpid()}")
        try:
            durable.replace(probe, b"graft\n")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        try:
            durable.replace(self.file(name), text.encode())
        except OSError as error:
            raise _unwritable(self.file(name), error) from None


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        expected="a run directory on a disk with space and permission to write",
        fix="free space, change its permissions, or set runtime.output_dir",
    )


def environment() -> dict[str, Any]:
    """What the process runs on: versions, command line, threads, machine, and the working directory's git commit."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "argv": list(sys.argv),
        "working_directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "git": _git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether files differ from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "modified": bool(_git("status", "--porcelain", "-uno"))}


def _git(*arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
