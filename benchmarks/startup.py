"""How long until something happens: help, a static check, imports, and the first step with a warm compiler cache."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ours
from benchmarks.timing import comparison, interleaved, record

PRESET = ours.PRESETS / "models" / "gemma3_tinystories_132m.yaml"


def run(args: argparse.Namespace) -> None:
    graft = [sys.executable, "-m", "graft"]
    timed = interleaved(
        {
            "python -c pass": command([sys.executable, "-c", "pass"]),
            "graft --help": command([*graft, "--help"]),
            "graft check --static": command([*graft, "check", "--static", str(PRESET)]),
            "graft schema": command([*graft, "schema"]),
            "import graft": command([sys.executable, "-c", "import graft"]),
            "import torch": command([sys.executable, "-c", "import torch"]),
            "import graft and what training needs": command(
                [sys.executable, "-c", "import graft.training.session, graft.api"]
            ),
        },
        rounds=args.rounds,
    )
    first = [first_step() for _ in range(1 + args.rounds)][1:]
    record(
        "Starting",
        f"{comparison(timed, 'python -c pass')}\n\n"
        "From the start of the process to the line that tells of the first compiled training step of the character "
        "preset, after an evaluation (tokens and compiler cache there from before): "
        f"{', '.join(f'{step:.1f}' for step, _ in first)} s; to the end of the process, with samples, baselines, "
        f"checkpoint and report: {', '.join(f'{end:.1f}' for _, end in first)} s.",
    )


def command(arguments: Sequence[str]) -> Callable[[], object]:
    """Runs a command and waits for it."""
    return lambda: subprocess.run(arguments, capture_output=True, check=True)


def first_step() -> tuple[float, float]:
    """Seconds until ``graft train`` for a single step tells of it, and until it ends."""
    arguments = ["training.max_steps=1", "schedule.warmup_steps=0", "evaluation.max_sequences=12"]
    preset = str(ours.PRESETS / "models" / "shakespeare_char.yaml")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "graft", "train", preset, *arguments, "--out", str(Path(folder) / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            told = next(time.perf_counter() for line in process.stdout if line.startswith("step 1/1  loss"))
            process.stdout.read()
        assert process.returncode == 0
        return told - start, time.perf_counter() - start
