"""How long until a small model of characters reaches a held-out loss, against nanoGPT's recipe for a CPU?

Needs ``--data FILE``: a text whose last tenth is held out. Both sides run as processes of their own, in turn, and score
the same number of held-out rows; training time excludes scoring, process time is everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import ours, peers
from benchmarks.timing import processor_seconds, record, table

PRESET = ours.PRESETS / "models" / "shakespeare_char.yaml"
TARGETS = (1.88, 1.70)
SCORED_ROWS = 480
RUNS = {"graft, 320 steps": 320, "graft, 800 steps": 800}


@dataclass(frozen=True)
class Outcome:
    """One trained model: seconds of the process by clock and by processor, and (steps, training seconds, held-out
    loss) at every evaluation."""

    process_seconds: float
    processor_seconds: float
    curve: Sequence[tuple[int, float, float]]

    def seconds_to(self, loss: float) -> float | None:
        """Training seconds at the first evaluation with at most this loss."""
        return next((seconds for _, seconds, found in self.curve if found <= loss), None)


def run(args: argparse.Namespace) -> None:
    if args.data is None:
        print("shakespeare: skipped, it needs --data FILE")
        return
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*RUNS, "nanoGPT's recipe, 2000 steps")}
    with tempfile.TemporaryDirectory() as cache:
        graft(args.data, 20, cache)  # fills the caches of tokens and of the compiler
        for _ in range(max(1, args.rounds // 2)):
            for name, steps in RUNS.items():
                outcomes[name].append(graft(args.data, steps, cache))
            outcomes["nanoGPT's recipe, 2000 steps"].append(nanogpt(args.data))
    rows = [[name, *(cell(found) for found in columns(list_of))] for name, list_of in outcomes.items()]
    header = [
        "",
        *(f"training s to {t}" for t in TARGETS),
        "training s in all",
        "held-out loss",
        "process s",
        "processor s",
    ]
    record(
        f"Characters of {args.data.name}",
        f"Held-out nats per character over {SCORED_ROWS} rows of 64; medians of {len(outcomes['graft, 320 steps'])} "
        "runs; caches of tokens and of the compiler are warm. graft evaluates every 40 steps, the peer every 100.\n\n"
        + table(header, rows),
    )


def columns(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Medians of what the table shows; None when a run missed a target."""
    reached = [[o.seconds_to(t) for o in outcomes] for t in TARGETS]
    times = [median([s for s in found if s is not None]) if None not in found else None for found in reached]
    return [
        *times,
        median(o.curve[-1][1] for o in outcomes),
        median(o.curve[-1][2] for o in outcomes),
        median(o.process_seconds for o in outcomes),
        median(o.processor_seconds for o in outcomes),
    ]


def cell(value: float | None) -> str:
    """A number with as many digits as it deserves."""
    return "not reached" if value is None else f"{value:.3f}" if value < 3 else f"{value:.1f}"


def graft(data: Path, steps: int, cache: str) -> Outcome:
    """One ``graft train`` of the preset."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu_start = time.perf_counter(), processor_seconds()
        subprocess.run(
            [
                *(sys.executable, "-m", "graft", "train", str(PRESET), "--out", f"{folder}/run"),
                f"data.source={{type: files, path: {data.resolve()}}}",
                f"runtime.cache_dir={cache}",
                f"training.max_steps={steps}",
                "evaluation.interval=40",
                f"evaluation.max_sequences={SCORED_ROWS}",
                "logging.interval=10",
                "checkpoint.interval=null",
            ],
            check=True,
            capture_output=True,
        )
        seconds, cpu = time.perf_counter() - start, processor_seconds() - cpu_start
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return Outcome(seconds, cpu, list(curve(lines)))


def curve(lines: Sequence[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Steps, training seconds and held-out loss of every evaluation, from the metric lines of a run."""
    found: list[tuple[int, float, float]] = []
    trained, tokens = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            trained += (line["tokens"] - tokens) / line["time"]["tokens_per_second"]
            tokens = line["tokens"]
        elif line["kind"] == "eval" and line["step"]:
            found.append((line["step"], trained, line["loss"]))
    return found


def nanogpt(data: Path) -> Outcome:
    """The peer, in a process of its own."""
    start, cpu_start = time.perf_counter(), processor_seconds()
    made = subprocess.run(
        [sys.executable, "-c", f"from benchmarks import shakespeare; shakespeare.peer({str(data.resolve())!r})"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = [tuple(row) for row in json.loads(made.stdout.splitlines()[-1])]
    return Outcome(time.perf_counter() - start, processor_seconds() - cpu_start, found)


def peer(path: str) -> None:
    """Trains the small GPT by nanoGPT's recipe and prints its curve."""
    text = Path(path).read_text(encoding="utf-8")
    characters = sorted(set(text))
    codes = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([codes[character] for character in text])
    held_out = ids[int(0.9 * len(ids)) :]
    rows = held_out[: len(held_out) // 65 * 65].view(-1, 65)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SCORED_ROWS]]
    torch.manual_seed(1337)
    found: list[tuple[int, float, float]] = []
    trained, last = 0.0, time.perf_counter()

    def after_step(step: int, model: peers.SmallGpt) -> None:
        nonlocal trained, last
        trained += time.perf_counter() - last
        if step % 100 == 0:
            with torch.no_grad():
                loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            found.append((step, trained, float(loss)))
        last = time.perf_counter()

    peers.train_small_gpt(ids[: int(0.9 * len(ids))], len(characters), peers.GptRecipe(), after_step=after_step)
    print(json.dumps(found))
