"""Interleaved timing: variants take turns in one process; ratios of medians are what counts."""

from __future__ import annotations

import datetime
import gc
import importlib
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADING = "# Results\n\nRatios of interleaved runs in one process; medians.\n"


@dataclass
class Timed:
    """Seconds of every round of one variant: by the clock, and of processor time (all threads, and child processes),
    which other processes on the machine hardly change; and what it returned."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    def per(self, count: int) -> Timed:
        """Of one, where a call made ``count`` of something."""
        seconds, cpu_seconds = ([s / count for s in each] for each in (self.seconds, self.cpu_seconds))
        return Timed(self.name, seconds, cpu_seconds, self.results)


class Elsewhere:
    """A variant that lives in a process of its own, with that process's memory allocator and compiler: called, it runs
    once there and returns the result.

    Args:
        module: name of a module of this package.
        function: makes the variant in the new process: a function of no arguments.
        arguments: of ``function``.
    """

    def __init__(self, module: str, function: str, **arguments: Any):
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        self._pipe = mine
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(theirs, module, function, arguments), daemon=True
        )
        self._process.start()
        self.cpu_seconds = 0.0

    def __call__(self) -> Any:
        self._pipe.send("run")
        result, self.cpu_seconds = self._pipe.recv()
        return result

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send("end")
        self._process.join()


def _serve(pipe: Any, module: str, function: str, arguments: dict[str, Any]) -> None:
    call = getattr(importlib.import_module(module), function)(**arguments)
    while pipe.recv() == "run":
        start = time.process_time()
        result = call()
        pipe.send((result, time.process_time() - start))


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def interleaved(variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timed]:
    """Calls the variants in turn (A, B, C, A, B, C, …) and times each call.

    Args:
        variants: name -> what to time.
        rounds: counted turns of each.
        warmup: turns before, not counted (compilation, caches).
    """
    timed = {name: Timed(name) for name in variants}
    for turn in range(warmup + rounds):
        for name, call in variants.items():
            gc.collect()
            start, cpu_start = time.perf_counter(), processor_seconds()
            result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                timed[name].seconds.append(time.perf_counter() - start)
                own = call.cpu_seconds if isinstance(call, Elsewhere) else processor_seconds() - cpu_start
                timed[name].cpu_seconds.append(own)
                timed[name].results.append(result)
    return timed


def paired_ratio(timed: Mapping[str, Timed], slow: str, fast: str) -> float:
    """Median over rounds of (seconds of ``slow`` / seconds of ``fast`` in the same round): how many times faster."""
    pairs = zip(timed[slow].seconds, timed[fast].seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def cpu_ratio(timed: Mapping[str, Timed], slow: str, fast: str) -> float:
    """`paired_ratio` of processor time: what holds when other processes take turns on the machine."""
    pairs = zip(timed[slow].cpu_seconds, timed[fast].cpu_seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def comparison(timed: Mapping[str, Timed], fast: str, *, unit: str = "ms") -> str:
    """A table of all variants: their times, and how many times faster ``fast`` is, by clock and by processor time."""
    rows = [
        [
            name,
            f"{1000 * t.median:,.1f}",
            f"{1000 * t.fastest:,.1f}",
            f"{1000 * statistics.median(t.cpu_seconds):,.1f}",
            f"{paired_ratio(timed, name, fast):.2f}",
            f"{cpu_ratio(timed, name, fast):.2f}",
        ]
        for name, t in timed.items()
    ]
    header = ["variant", f"{unit}, median", "fastest", "processor time, median", "ratio", "ratio of processor time"]
    return table(header, rows)


def environment() -> str:
    """One line that says where and with what the figures were measured."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{datetime.datetime.now(tz=datetime.UTC).date()}, {cpu}, {os.cpu_count()} CPUs{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"load {load()}"
    )


def load() -> str:
    """Processes that want to run, over the last minute and the last five: what a measurement had beside it."""
    one, five, _ = os.getloadavg()
    return f"{one:.1f} / {five:.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(title: str, text: str) -> None:
    """Replaces the section ``title`` of RESULTS.md by ``text`` (with where and when it was measured), and prints it."""
    section = f"## {title}\n\n{environment()}\n\n{text.strip()}\n"
    print(section)
    old = RESULTS.read_text() if RESULTS.exists() else HEADING
    head, *sections = old.split("\n## ")
    kept = [s for s in sections if not s.startswith(f"{title}\n")]
    parts = [head.strip(), *("## " + s.strip() for s in kept), section.strip()]
    RESULTS.write_text("\n\n".join(parts) + "\n")
