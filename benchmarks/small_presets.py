"""Does each token mixer learn the embedded corpus, and how well beside counting and beside the default preset?

Trains ``presets/models/default.yaml`` and ``presets/models/<mixer>_small.yaml`` of every mixer, one after another, each
in a process of its own. ``--steps`` shortens all of them, schedule included; without it each runs its own length.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import graft
from benchmarks.ours import PRESETS
from benchmarks.timing import Elsewhere, record, table
from graft.config.load import load_experiment
from graft.config.registry import variants
from graft.report.baselines import measure_baselines

MODELS = PRESETS / "models"


@dataclass(frozen=True)
class Outcome:
    """One trained preset.

    Args:
        parameters: of the model.
        steps: updates made.
        untrained: held-out bits per byte before the first.
        trained: after the last.
        seconds: of training alone, by the clock.
    """

    parameters: int
    steps: int
    untrained: float
    trained: float
    seconds: float


def names() -> list[str]:
    """The default preset, then one per mixer that has one, then the two that differ by their positions."""
    mixers = (f"{mixer}_small" for mixer in variants("token_mixer") if (MODELS / f"{mixer}_small.yaml").exists())
    return ["default", *mixers, "attention_hope_small", "attention_xpos_small"]


def overrides(steps: int | None) -> list[str]:
    """What a benchmark changes about a preset: nothing that decides the numbers, unless ``steps`` shortens it."""
    quiet = ["checkpoint.interval=null", "evaluation.interval=null"]
    if steps is None:
        return quiet
    return [*quiet, f"training.max_steps={steps}"]


def training(*, name: str, steps: int | None) -> Callable[[], Outcome]:
    """What `benchmarks.timing.Elsewhere` runs."""

    def train() -> Outcome:
        experiment = load_experiment(MODELS / f"{name}.yaml", overrides(steps))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            run = graft.train(experiment, out=out, stream=io.StringIO())
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        scored = [line["bpb"] for line in lines if line["kind"] == "eval"]
        seconds = max(line["time"]["seconds"] for line in lines if line["kind"] == "train")
        return Outcome(run.model.num_parameters(), run.step, scored[0], scored[-1], seconds)

    return train


def measured(name: str, steps: int | None) -> tuple[Outcome, float]:
    """One preset trained, and the processor time of its process."""
    process = Elsewhere("benchmarks.small_presets", "training", name=name, steps=steps)
    outcome = process()
    process.close()
    return outcome, process.cpu_seconds


def run(args: argparse.Namespace) -> None:
    baselines = measure_baselines(load_experiment(MODELS / "default.yaml"))
    goal = baselines["5-gram"]
    rows = []
    for name in names():
        found, processor_seconds = measured(name, args.steps)
        verdict = "yes" if found.trained < goal else "no"
        print(f"{name}: {found.trained:.3f} bpb after {found.steps} steps, {found.seconds:.0f} s", flush=True)
        rows.append(
            [
                name,
                f"{found.parameters:,}",
                str(found.steps),
                f"{found.untrained:.3f}",
                f"{found.trained:.3f}",
                verdict,
                f"{found.seconds:.0f}",
                f"{processor_seconds:.0f}",
            ]
        )
    header = [
        "preset",
        "parameters",
        "steps",
        "untrained",
        "trained",
        "beats 5-gram",
        "training s",
        "processor s, whole",
    ]
    counted = ", ".join(f"{name} {bits:.3f}" for name, bits in baselines.items())
    record(
        "Small presets, one per token mixer",
        "Held-out bits per byte of the embedded corpus. Counting, on the same rows: "
        + counted
        + ".\n\n"
        + table(header, rows),
    )
