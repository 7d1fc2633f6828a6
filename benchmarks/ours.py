"""graft's side of a comparison: its own training step on given batches, without files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Timed
from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.data.batch import Batch
from graft.model import build_model
from graft.training.matmul import product_seconds
from graft.training.precision import Precision
from graft.training.run import Run
from graft.training.runtime import configure_runtime, runtime_restored
from graft.training.step import train_step
from graft.training.throughput import flops_per_token

PRESETS = Path(__file__).parents[1] / "presets"


def gemma_132m(*overrides: str, rows: int = 8, seq_len: int = 128) -> Experiment:
    """Gemma 3 at 132 million parameters, ``rows`` sequences of ``seq_len`` per step."""
    return load_experiment(
        PRESETS / "models" / "gemma3_tinystories_132m.yaml",
        [
            f"data.seq_len={seq_len}",
            f"training.global_batch_size={rows}",
            f"training.micro_batch_size={rows}",
            "training.max_grad_norm=1.0",
            *overrides,
        ],
    )


def random_ids(steps: int, rows: int, seq_len: int, vocab_size: int, *, seed: int = 0) -> list[Tensor]:
    """Per step ``[B, T + 1]`` random ids: inputs and the targets one further."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (rows, seq_len + 1), generator=generator) for _ in range(steps)]


class Steps:
    """Hands out one batch per step, round and round: what a loader does, without a store."""

    def __init__(self, ids: Sequence[Tensor]):
        self.batches = [_batch(i) for i in ids]
        self.index = 0

    def next_step(self) -> list[Batch]:
        batch = self.batches[self.index % len(self.batches)]
        self.index += 1
        return [batch]


def _batch(ids_BL: Tensor) -> Batch:
    inputs, targets = ids_BL[:, :-1].contiguous(), ids_BL[:, 1:].contiguous()
    return Batch(inputs, targets, None, None, targets.numel(), targets.numel(), tuple(range(len(ids_BL))))


def trainer(experiment: Experiment, ids: Sequence[Tensor]) -> Run:
    """A run over ``ids``, set up by the experiment's runtime as ``graft train`` does."""
    vocab_size = experiment.model.vocab_size
    assert vocab_size is not None
    model = build_model(experiment.model, vocab_size, seed=experiment.seed)
    runtime = experiment.runtime
    model.set_runtime(
        compile=runtime.compile,
        activation_checkpointing=runtime.activation_checkpointing,
        kernels=runtime.kernels,
        loss_chunk_bytes=runtime.loss_chunk_bytes,
    )
    device = torch.device("cpu")
    loader: Any = Steps(ids)
    prepared: Any = None  # only evaluation reads it
    run = Run(experiment, model, prepared, loader, device=device, precision=Precision(experiment.precision, device))
    model.train()
    return run


def matmul_precision(run: Run) -> str:
    """The setting of fp32 products that the run's own runtime settings lead to; applies the lasting ones of them."""
    experiment = run.experiment
    shape = (experiment.tokens_per_step, experiment.model.hidden_size, 4 * experiment.model.hidden_size)
    with runtime_restored():
        configure_runtime(experiment.runtime, matmul_shape=shape)
        return torch.get_float32_matmul_precision()


def stepper(run: Run) -> Callable[[], float]:
    """One training step, in a process that from now on has the run's own runtime settings. Returns the loss."""
    torch.set_float32_matmul_precision(matmul_precision(run))

    def step() -> float:
        return float(train_step(run).loss)

    return step


def flops_per_step(run: Run) -> float:
    """Matrix-product FLOPs of one step, visible pairs only."""
    return run.experiment.tokens_per_step * flops_per_token(run.model, run.experiment.data.seq_len)


def peak_rate(size: int = 2048, *, products: int = 10) -> Callable[[], float]:
    """The best rate of a few bf16 products, FLOP/s."""
    a_SS = torch.randn(size, size).bfloat16()
    return lambda: max(2 * size**3 / product_seconds(a_SS, a_SS) for _ in range(products))


def share_of_rate(step: Timed, flops: float, rate: Timed) -> float:
    """The percentage of the matrix-product rate that a step of ``flops`` reaches: median over rounds, each against the
    rate measured in the same round, because the machine's speed changes from minute to minute."""
    pairs = zip(step.seconds, rate.results, strict=True)
    return statistics.median(100 * flops / seconds / best for seconds, best in pairs)
