"""Append-only JSON-lines files that survive crashes, full disks and rotation, and never hold a training step twice.

``metrics.jsonl`` is comparable: a run that was killed and resumed writes the same bytes as one that was not, except for
the sub-object ``time``, where everything measured by a clock belongs. Steps, not times, order the lines.
``events.jsonl`` is a history (saves, warnings, resumes): nothing is ever taken out of it.

Fail-point: ``log.append`` before each line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.faults import fault_point
from graft.training import durable

logger = logging.getLogger(__name__)


class JsonLines:
    """One file of JSON lines, open for appending. A line is whole on the disk or not there at all.

    Trouble with the disk is logged once as a warning and costs lines, never the run; writing goes on when the disk
    recovers. A file that was deleted or rotated away is made again.

    Args:
        path: the file; made if missing. A torn last line (from a crash) is cut off when the file is opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        self._warned = False
        try:
            _cut_torn_line(path)
        except OSError as error:
            self.warn(error)

    def append(self, record: Mapping[str, Any], step: int | None = None) -> bool:
        """Writes one line through to the operating system; False when the disk refused it.

        Floats are written so that they read back bit for bit; NaN and infinities, for which JSON has no word, as the
        strings "NaN", "Infinity" and "-Infinity".
        """
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            fault_point("log.append", step)
            self._write(line)
        except OSError as error:
            self.warn(error)
            return False
        return True

    def sync(self) -> None:
        """Waits until everything is on the disk; call it before a checkpoint that says these lines exist."""
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self.warn(error)

    def close(self) -> None:
        """Closes the file; `append` would open it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, line: bytes) -> None:
        descriptor = self._open()
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(descriptor, before)
            raise

    def _open(self) -> int:
        if self._descriptor is not None and not self._still_there(self._descriptor):
            self.close()
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o644)
        return self._descriptor

    def _still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def warn(self, error: OSError) -> None:
        """Says once that the disk refuses lines."""
        if not self._warned:
            self._warned = True
            logger.warning("%s cannot be written (%s); the run goes on without", self.path, error.strerror or error)


class MetricsLog:
    """``metrics.jsonl``: one line per report of a training step.

    Args:
        path: the file.
        resume_step: the step the run continues after; None starts anew. Lines later than that (and lines that cannot
            be read) move to ``metrics.dropped.jsonl``, so the continued run writes each step once.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None):
        self.path = path
        self._lines = JsonLines(path)
        self.rewind(resume_step)

    def write(self, step: int, values: Mapping[str, Any], *, time: Mapping[str, float] | None = None) -> bool:
        """Appends ``{"step": …, **values, "time": {…}}``; False when the disk refused the line (warned once).

        Args:
            step: the training step the values belong to.
            values: numbers that a repeated run repeats.
            time: numbers that it does not (seconds, tokens per second); left out when there are none.
        """
        assert "step" not in values, "the step is an argument of its own"
        assert "time" not in values, "clock readings are an argument of their own"
        record = {"step": step, **values, **({"time": dict(time)} if time else {})}
        return self._lines.append(record, step)

    def rewind(self, step: int | None) -> int:
        """Moves the lines later than ``step`` (None: all) to ``metrics.dropped.jsonl``; returns how many.

        Also for a run that goes back to its last good checkpoint while it runs.
        """
        self._lines.close()
        try:
            return _drop_after(self.path, step)
        except OSError as error:
            self._lines.warn(error)
            return 0

    def sync(self) -> None:
        """Waits until every line is on the disk."""
        self._lines.sync()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class EventsLog:
    """``events.jsonl``: what happened beside the numbers, in order, for people and for the report."""

    def __init__(self, path: Path):
        self.path = path
        self._lines = JsonLines(path)

    def write(self, kind: str, fields: Mapping[str, Any] | None = None, *, step: int | None = None) -> None:
        """Appends ``{"event": kind, "step": step, **fields, "time": {"unix": …}}``. Never fails (warns once)."""
        named = {"event": kind, **({"step": step} if step is not None else {})}
        extra = dict(fields or {})
        assert not extra.keys() & {"event", "time"}, "an event's fields have other names"
        self._lines.append({**named, **extra, "time": {"unix": time.time()}}, step)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, without lines that are no JSON objects (a line being written, damage)."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [record for record in map(_record, file) if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _cut_torn_line(path: Path) -> None:
    """Removes what follows the last newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _drop_after(path: Path, step: int | None) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        lines = file.readlines()
    belongs = [_belongs(line, step) for line in lines]
    dropped = [line for line, stays in zip(lines, belongs, strict=True) if not stays]
    if not dropped:
        return 0
    with path.with_name(f"{path.stem}.dropped{path.suffix}").open("ab") as file:
        file.writelines(dropped)
        file.flush()
        os.fsync(file.fileno())
    kept = [line for line, stays in zip(lines, belongs, strict=True) if stays]
    if all(belongs[: len(kept)]):
        os.truncate(path, sum(map(len, kept)))  # the usual case; works on a full disk too
    else:
        durable.replace(path, b"".join(kept))
    return len(dropped)


def _belongs(line: bytes, step: int | None) -> bool:
    record = _record(line)
    if record is None or type(record.get("step")) is not int or step is None:
        return False
    return record["step"] <= step
