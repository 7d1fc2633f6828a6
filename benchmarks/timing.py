"""Interleaved timing: variants take turns in one process; ratios of medians are what counts."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADING = "# Results\n\nRatios of interleaved runs in one process; medians.\n"


@dataclass
class Timed:
    """Seconds of every round of one variant."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)


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
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                timed[name].seconds.append(time.perf_counter() - start)
    return timed


def paired_ratio(timed: Mapping[str, Timed], slow: str, fast: str) -> float:
    """Median over rounds of (seconds of ``slow`` / seconds of ``fast`` in the same round): how many times faster."""
    pairs = zip(timed[slow].seconds, timed[fast].seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


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
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(title: str, text: str) -> None:
    """Replaces the section ``title`` of RESULTS.md by ``text`` (with where and when it was measured), and prints it."""
    section = f"## {title}\n\n{environment()}\n\n{text.strip()}\n"
    print(section)
    old = (
        RESULTS.read_text()
        if RESULTS.exists()
        else HEADING
    )
    head, *sections = old.split("\n## ")
    kept = [s for s in sections if not s.startswith(f"{title}\n")]
    parts = [head.strip(), *("## " + s.strip() for s in kept), section.strip()]
    RESULTS.write_text("\n\n".join(parts) + "\n")
