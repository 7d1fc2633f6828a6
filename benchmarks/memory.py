"""What does the fused cross-entropy save, and what activation checkpointing? Each figure is a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks import ours
from benchmarks.timing import record, table
from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.ops.cross_entropy import linear_cross_entropy
from graft.training.runtime import peak_memory_bytes, tune_allocator

POSITIONS, WIDTH, VOCAB = 4096, 640, 50257
MODES = ("plain", "fused", "plain bf16", "fused bf16", "training", "training, less memory")


def run(args: argparse.Namespace) -> None:
    rounds = max(3, args.rounds)
    figures = {mode: [child(mode) for _ in range(rounds)] for mode in MODES}
    rows: list[list[str]] = []
    for plain, saving in (MODES[0:2], MODES[2:4], MODES[4:6]):
        for mode in (plain, saving):
            memory, seconds, cpu = (median(figure[i] for figure in figures[mode]) for i in range(3))
            base = [median(figure[i] for figure in figures[plain]) for i in range(3)]
            rows.append(
                [
                    mode,
                    f"{memory / 1e6:,.0f}",
                    f"{base[0] / memory:.2f}",
                    f"{seconds:.2f}",
                    f"{100 * (seconds / base[1] - 1):+.0f} %",
                    f"{100 * (cpu / base[2] - 1):+.0f} %",
                ]
            )
    header = ["", "MB", "times less", "s", "more time", "more processor time"]
    record(
        "Memory of the loss and of activations",
        f"First four lines: cross-entropy of {POSITIONS} x {WIDTH} features with a head of {VOCAB} rows, forward and "
        "backward, memory beyond the inputs; plain is F.linear and F.cross_entropy, fused works in chunks of 64 MiB. "
        "Last two: peak memory of the process training a decoder of width 512 with 12 layers on 4 x 1024 tokens in "
        "bf16 autocast; less memory means activation checkpointing per layer and loss chunks of 64 MiB.\n\n"
        + table(header, rows),
    )


def child(mode: str) -> tuple[float, float, float]:
    """Bytes, seconds and processor seconds of one mode, measured in a fresh process."""
    command = [sys.executable, "-c", f"from benchmarks import memory; memory.measure({mode!r})"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    bytes_used, seconds, cpu = json.loads(made.stdout.splitlines()[-1])
    return bytes_used, seconds, cpu


def measure(mode: str) -> None:
    """Prints [bytes, seconds, processor seconds] of one mode: the median of a few repetitions."""
    tune_allocator()
    figures = train(mode) if mode.startswith("training") else loss(mode)
    print(json.dumps(figures))


def timed(call: object) -> tuple[float, float]:
    """Median seconds and processor seconds of three calls, after one that warms up."""
    assert callable(call)
    clock, cpu = [], []
    for _ in range(4):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        clock.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return median(clock[1:]), median(cpu[1:])


def loss(mode: str) -> tuple[float, float, float]:
    """Cross-entropy alone."""
    dtype = torch.bfloat16 if mode.endswith("bf16") else torch.float32
    torch.set_float32_matmul_precision("medium")  # the route graft takes here; the same for both
    x_TD = torch.randn(POSITIONS, WIDTH, dtype=dtype, requires_grad=True)
    # as large as a model's: beyond, exp runs into numbers below fp32's normal range, which cost 20 times as much
    weight_VD = (0.02 * torch.randn(VOCAB, WIDTH)).to(dtype).requires_grad_()
    targets_T = torch.randint(VOCAB, (POSITIONS,))

    def step() -> None:
        if mode.startswith("plain"):
            logits_TV = torch.nn.functional.linear(x_TD, weight_VD).float()
            total = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
        else:
            total = linear_cross_entropy(x_TD, weight_VD, targets_T, chunk_bytes=64 * 2**20).loss
        total.backward()
        x_TD.grad = weight_VD.grad = None

    before = peak_memory_bytes() or 0
    step()
    return (peak_memory_bytes() or 0) - before, *timed(step)


def train(mode: str) -> tuple[float, float, float]:
    """A training step with everything kept, or with little kept."""
    ids = ours.random_ids(2, 4, 1024, VOCAB)
    run = ours.trainer(decoder(saving=mode != "training"), ids)
    seconds = timed(ours.stepper(run))
    return peak_memory_bytes() or 0, *seconds


def decoder(*, saving: bool) -> Experiment:
    """d512, 12 layers, T1024."""
    saved = ["runtime.activation_checkpointing=block", f"runtime.loss_chunk_bytes={64 * 2**20}"]
    everything = [f"runtime.loss_chunk_bytes={8 * 2**30}"]
    return load_experiment(
        ours.PRESETS / "models" / "toy54m_baseline.yaml",
        [
            f"model.vocab_size={VOCAB}",
            "data.seq_len=1024",
            "training.global_batch_size=4",
            "training.micro_batch_size=4",
            "precision=bf16",
            *(saved if saving else everything),
        ],
    )
