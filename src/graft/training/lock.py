"""One writer per run directory.

The operating system's file lock decides (it ends with the process that holds it, however that dies); the file's
content says in words who holds it. Where the file system has no locks, the content decides: a lock counts while its
process lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.errors import ResourceError

try:
    import fcntl
except ImportError:  # not a Unix system: the recorded process decides
    fcntl = None

logger = logging.getLogger(__name__)

_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same number.

    Args:
        host: name of its machine.
        pid: its number there.
        born: start time in clock ticks since the machine started, 0 where the system does not tell.
    """

    host: str
    pid: int
    born: int

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _born(os.getpid()))

    def may_live(self) -> bool:
        """False when it certainly runs no more. A process of another machine may always live."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass  # it exists and belongs to someone else
        born = _born(self.pid)
        return not (self.born and born and self.born != born)


def _born(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # the second field is the program's name in brackets and may hold blanks and brackets of its own
    return int(stat.rpartition(")")[2].split()[19])


class RunLock:
    """The lock file of one run directory. Not held until `acquire`; released by `release` or by the end of the process.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Takes the lock, also one whose process died without releasing it (logged as a warning).

        Raises:
            ResourceError: another process holds it (says which), or the file cannot be written.
        """
        assert not self.held, f"{self.path} is already held"
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ResourceError(f"cannot open the lock file: {error.strerror}", where=str(self.path)) from None
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Gives the lock up; does nothing when it is not held."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # an unwritable disk must not keep a run from ending
            os.ftruncate(self._descriptor, 0)
        self._forget()

    def _take(self, descriptor: int) -> None:
        locked = _system_lock(descriptor)
        holder = _read_holder(descriptor)
        if locked is False or (locked is None and holder is not None and holder[0].may_live()):
            raise self._refusal(holder)
        if holder is not None:
            logger.warning("%s: took over the lock of %s, which ended without releasing it", self.path, _words(*holder))
        record = {**asdict(Process.current()), "since": time.time()}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(record).encode(), 0)
        except OSError as error:
            raise ResourceError(f"cannot write the lock file: {error.strerror}", where=str(self.path)) from None

    def _refusal(self, holder: tuple[Process, float] | None) -> ResourceError:
        who = _words(*holder) if holder else "another process"
        return ResourceError(
            f"the run directory is in use by {who}",
            where=str(self.path),
            expected="one process per run directory",
            fix="wait for it, stop it, or choose another run directory; "
            "if that machine is gone for good, delete the lock file",
        )

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        _held.discard(self)


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    # a forked data worker must not keep the lock alive after the trainer died; closing its copy releases nothing
    os.register_at_fork(after_in_child=_forget_all)


def _system_lock(descriptor: int) -> bool | None:
    """True: locked now. False: another holds it. None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return None
        raise
    return True


def _read_holder(descriptor: int) -> tuple[Process, float] | None:
    try:
        record: Any = json.loads(os.pread(descriptor, 65536, 0))
        return Process(str(record["host"]), int(record["pid"]), int(record["born"])), float(record["since"])
    except (ValueError, KeyError, TypeError):
        return None


def _words(process: Process, since: float) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    return f"process {process.pid} on {process.host} (since {started})"
