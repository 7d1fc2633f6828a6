"""How much of the machine's bf16 matrix-product rate do training steps use? Three shapes, and the rate itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks import ours
from benchmarks.timing import Elsewhere, interleaved, record, table
from graft.config.experiment import Experiment
from graft.config.load import load_experiment

SHAPES = ("Gemma 3 132M, 8 x 128", "width 512, 12 layers, 4 x 1024", "characters, width 128, 4 layers, 12 x 64")
GOALS = (70, 60, 45)


def run(args: argparse.Namespace) -> None:
    variants = {name: Elsewhere("benchmarks.utilisation", "steps", name=name) for name in SHAPES}
    rate = Elsewhere("benchmarks.ours", "peak_rate")
    timed = interleaved({**variants, "rate": rate}, rounds=args.rounds, warmup=2)
    rows: list[list[str]] = []
    for name, goal in zip(variants, GOALS, strict=True):
        flops, steps = timed[name].results[0]
        cpu = min(timed[name].cpu_seconds) / steps
        times = (1000 * timed[name].median / steps, 1000 * timed[name].fastest / steps, 1000 * cpu)
        share = ours.share_of_rate(timed[name], flops * steps, timed["rate"])
        rows.append([name, f"{flops / 1e9:,.1f}", *(f"{t:,.1f}" for t in times), f"{share:.0f} %", f"{goal} %"])
    header = ["step", "GFLOP", "ms, median", "fastest", "processor ms, least", "share", "goal"]
    slowest, fastest = (f(timed["rate"].results) / 1e9 for f in (min, max))
    record(
        "Share of the bf16 matrix-product rate",
        f"{table(header, rows)}\n\nShares are medians over rounds, each of the rate measured in the same round: "
        f"{slowest:,.0f} to {fastest:,.0f} GFLOP/s. Visible pairs only are counted.",
    )
    for variant in (*variants.values(), rate):
        variant.close()


def experiment(name: str) -> Experiment:
    """The training run of a shape, bf16 and compiled."""
    fast = ["precision=bf16", "runtime.compile=true"]
    if name == SHAPES[0]:
        return ours.gemma_132m(*fast)
    models = ours.PRESETS / "models"
    if name == SHAPES[2]:
        adamw = "optimizer={type: adamw, learning_rate: 1e-3}"  # Muon's own products are not counted
        return load_experiment(models / "shakespeare_char.yaml", ["model.vocab_size=66", adamw, *fast])
    sizes = [
        "model.vocab_size=50304",
        "data.seq_len=1024",
        "training.global_batch_size=4",
        "training.micro_batch_size=4",
    ]
    return load_experiment(models / "toy54m_baseline.yaml", [*sizes, *fast])


def steps(name: str) -> Callable[[], tuple[float, int]]:
    """Runs steps for about as long as one of the largest takes; returns a step's FLOPs and how many there were."""
    given = experiment(name)
    assert given.model.vocab_size is not None
    rows, seq_len = given.training.global_batch_size, given.data.seq_len
    run = ours.trainer(given, ours.random_ids(4, rows, seq_len, given.model.vocab_size))
    step, flops = ours.stepper(run), ours.flops_per_step(run)
    count = max(1, round(5e11 / flops))

    def several() -> tuple[float, int]:
        for _ in range(count):
            step()
        return flops, count

    return several
