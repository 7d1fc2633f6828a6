"""What a person sees while a run trains: a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from graft.config.advice import marked

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A number in three digits with a decimal prefix: 54538752 -> 54.5M."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def describe(line: Mapping[str, Any], marks: Mapping[str, bool]) -> str:
    """One metric line in words: loss, rate, speed, share of peak, time left, memory. Absent numbers are left out.

    What is true of the numbers (`graft.config.advice.marks`) comes last.
    """
    time = line.get("time", {})
    numbers = (
        ("loss", line.get("loss"), "{:.4f}"),
        ("bpb", line.get("bpb"), "{:.4f}"),
        ("lr", line.get("learning_rate"), "{:.2e}"),
        ("grad norm", line.get("grad_norm"), "{:.3g}"),
    )
    words = [f"{name} {form.format(value)}" for name, value, form in numbers if value is not None]
    if time.get("tokens_per_second"):
        words.append(f"{short(time['tokens_per_second'])} tokens/s")
    if time.get("mfu") is not None:
        words.append(f"MFU {100 * time['mfu']:.0f} %")
    if time.get("memory_bytes"):
        words.append(f"{time['memory_bytes'] / 2**30:.2f} GiB")
    if time.get("seconds_left") is not None:
        words.append(f"{duration(time['seconds_left'])} left")
    return marked("  ".join(words), marks)


class Console:
    """Says things to a person and to ``train.log``. A full disk costs the log file one warning, the run nothing; nor
    does a person who stops reading (a closed pipe) or whose output cannot be written: what is said goes to the log.

    Args:
        log_file: file that keeps everything said; None = none.
        stream: where a person reads; None = stderr.
    """

    def __init__(self, log_file: Path | None = None, stream: TextIO | None = None):
        self._stream: TextIO | None = stream or sys.stderr
        self._log_file = log_file
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Prints a line (above the progress bar, if there is one) and keeps it in the log."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            try:
                print(text, file=self._stream, flush=True)
            except OSError as error:
                self._stream = None
                self._keep(f"warning: nobody can read along any more ({error.strerror or error})")
        self._keep(text)

    def warn(self, text: str) -> None:
        """Says that something is not as it should be."""
        self.say(f"warning: {text}")

    def _keep(self, text: str) -> None:
        if self._log_file is None:
            return
        try:
            with self._log_file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            name, self._log_file = self._log_file, None
            self.warn(f"{name} cannot be written and is given up: {error.strerror or error}")

    def show(self, step: int, total: int, line: Mapping[str, Any], marks: Mapping[str, bool]) -> None:
        """Shows a metric line and its marks: in the progress bar on a terminal, as a line of its own otherwise."""
        text = describe(line, marks)
        if self._progress is None or self._task is None:
            self.say(f"step {step}/{total}  {text}")
            return
        self._progress.update(self._task, completed=step, numbers=text)
        self._keep(f"step {step}/{total}  {text}")

    def advance(self, step: int) -> None:
        """Moves the progress bar, where there is one."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def start_progress(self, step: int, total: int) -> None:
        """Opens the progress bar if the stream is a terminal."""
        if self._stream is None or not self._stream.isatty():
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        terminal = RichConsole(file=self._stream)
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=terminal, refresh_per_second=4)
        self._task = self._progress.add_task("training", total=total, completed=step, numbers="")
        self._progress.start()

    def stop_progress(self) -> None:
        """Closes the progress bar; what follows are plain lines again."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop_progress()
