"""Every error a user can cause, with the exit code the process ends with.

An error answers four questions: *where* (file, line, field), *what* is wrong, what was *expected*, and what to *do*.
Data, configs and users raise these kinds; graft's own invariants use ``assert``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of a plain ``graft`` process (``status.json`` says the same under a launcher that flattens codes)."""

    DONE = 0
    INTERNAL = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    DIVERGED = 5
    RESOURCES = 6
    PREEMPTED = 75
    INTERRUPTED = 130


class GraftError(Exception):
    """Base of all errors that are shown to a person without a traceback.

    Args:
        problem: what is wrong, one sentence.
        where: file, line, field or object it is wrong in.
        expected: what would have been right.
        fix: what to do now.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init__(self, problem: str, *, where: str | None = None, expected: str | None = None, fix: str | None = None):
        self.problem = problem
        self.where = where
        self.expected = expected
        self.fix = fix
        super().__init__(self.render())

    def render(self) -> str:
        """The whole message: ``where: problem; expected …; what to do``."""
        head = f"{self.where}: {self.problem}" if self.where else self.problem
        tail = [f"expected {self.expected}"] if self.expected else []
        tail += [self.fix] if self.fix else []
        return "; ".join([head, *tail])


class ConfigError(GraftError):
    """The configuration cannot mean anything (exit 2)."""

    exit_code = ExitCode.CONFIG


class DataError(GraftError):
    """The data or tokenizer is missing, broken or does not match the run (exit 3)."""

    exit_code = ExitCode.DATA


class CheckpointError(GraftError):
    """No checkpoint can be read, or it does not belong to this run (exit 4)."""

    exit_code = ExitCode.CHECKPOINT


class DivergedError(GraftError):
    """Loss, gradients or parameters are not finite and could not be recovered (exit 5)."""

    exit_code = ExitCode.DIVERGED


class ResourceError(GraftError):
    """Disk, memory, permissions or an optional package are missing (exit 6)."""

    exit_code = ExitCode.RESOURCES


class Preempted(GraftError):
    """The run was asked to stop, saved, and can be resumed by the same command (exit 75)."""

    exit_code = ExitCode.PREEMPTED


class Interrupted(GraftError):
    """A second interrupt forced the exit; the last checkpoint is valid (exit 130)."""

    exit_code = ExitCode.INTERRUPTED


def missing_extra(package: str, extra: str, purpose: str) -> ResourceError:
    """The error for an optional package that is not installed: names the extra that brings it."""
    return ResourceError(
        f"{purpose} needs the package '{package}', which is not installed",
        fix=f"pip install 'graft[{extra}]' -c constraints.txt",
    )
