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
    first = [first_step() for _ in range(3)]
    record(
        "Starting",
        f"{comparison(timed, 'python -c pass')}\n\n"
        "From the start of the process to the end of the first compiled training step of the character preset "
        f"(tokens and compiler cache there from before): {', '.join(f'{s:.1f}' for s in first[1:])} s.",
    )


def command(arguments: Sequence[str]) -> Callable[[], object]:
    """Runs a command and waits for it."""
    return lambda: subprocess.run(arguments, capture_output=True, check=True)


def first_step() -> float:
    """Seconds of ``graft train`` for a single step, saving included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "graft", "train", str(ours.PRESETS / "models" / "shakespeare_char.yaml")),
                *("training.max_steps=1", "schedule.warmup_steps=0", "evaluation.max_sequences=12"),
                *("--out", str(Path(folder) / "run")),
            ],
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - start
