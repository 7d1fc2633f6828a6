"""How long preparation reports that it is alive."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told of every piece of work: the stage's name, what is done, and the whole (None = not known)."""

    def __call__(self, stage: str, done: float, total: float | None) -> None: ...


def no_progress(stage: str, done: float, total: float | None) -> None:
    """Reports nothing."""


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """``progress`` itself; without one, bars on stderr if that is a terminal, else silence."""
    if progress is not None:
        yield progress
    elif not sys.stderr.isatty():
        yield no_progress
    else:
        with _bars() as bars:
            yield bars


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: float, total: float | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
