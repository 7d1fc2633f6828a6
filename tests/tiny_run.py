"""A run small enough to train in a second, and runs killed on purpose. Shared by the training and the fault tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from graft.config.experiment import Experiment
from graft.config.load import load_experiment_from_dict
from graft.data.batch import Batch
from graft.model import build_model
from graft.training.precision import Precision
from graft.training.run import Run
from graft.training.state import flatten_state

CPU = torch.device("cpu")
WORDS = ("the", "a", "cat", "dog", "sees", "hears", "red", "small", "tree", "house", "river", "and", "or", "then")


def write_text(path: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """A few kilobytes of paragraphs made of `WORDS`, the same every time."""
    draw = random.Random(seed)
    path.write_text("\n\n".join(" ".join(draw.choices(WORDS, k=draw.randint(8, 24))) for _ in range(documents)))
    return path


def tiny_dict(folder: Path) -> dict[str, Any]:
    """About 20 thousand parameters with dropout everywhere, two micro-batches per step, 12 steps, everything logged."""
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}, "dropout": 0.1}
    mlp = {"type": "mlp", "intermediate_size": 32, "dropout": 0.1, "residual_dropout": 0.1}
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return {
        "name": "tiny",
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "norm": {"type": "rms_norm"},
            "blocks": {"main": [attention, mlp]},
        },
        "objective": {"type": "causal_lm", "z_loss_coef": 1e-4},
        "data": {
            "source": {"type": "files", "path": str(text), "document": "paragraph"},
            "validation": {"fraction": 0.1},
            "tokenizer": {"type": "bytes"},
            "seq_len": 32,
        },
        "optimizer": {"type": "adamw", "learning_rate": 3e-3},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "training": {"max_steps": 12, "global_batch_size": 4, "micro_batch_size": 2},
        "evaluation": {"interval": 4, "max_sequences": 4},
        "checkpoint": {"interval": 4, "keep_last": 10},
        "logging": {"interval": 1},
        "runtime": {
            "output_dir": str(folder / "runs"),
            "cache_dir": str(folder / "cache"),
            "fp32_matmul": "default",
            "tune_allocator": False,
            "threads": 1,
        },
    }


def tiny(folder: Path, *overrides: str) -> Experiment:
    """The tiny experiment with its text in ``folder``, changed by dotted overrides."""
    return load_experiment_from_dict(tiny_dict(folder), overrides)


class ListedLoader:
    """Hands out given steps, for tests that need no files."""

    def __init__(self, steps: list[list[Batch]]):
        self.steps = steps
        self.index = 0

    def next_step(self) -> list[Batch]:
        step = self.steps[self.index % len(self.steps)]
        self.index += 1
        return step

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]

    def close(self) -> None:
        pass


def random_batch(rows: int, seq_len: int, *, seed: int, ignored: int = 0) -> Batch:
    """Random bytes; the first ``ignored`` targets of every row are not predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, 257, (rows, seq_len), generator=generator)
    targets_BT = torch.randint(0, 256, (rows, seq_len), generator=generator)
    targets_BT[:, :ignored] = -100
    count = int((targets_BT >= 0).sum())
    sample_ids = tuple(range(seed * rows, (seed + 1) * rows))
    return Batch(ids_BT, targets_BT, None, None, num_targets=count, num_bytes=count, sample_ids=sample_ids)


def bare_run(experiment: Experiment, steps: list[list[Batch]]) -> Run:
    """A run on listed batches: no files, no directory."""
    model = build_model(experiment.model, 257, seed=experiment.seed)
    precision = Precision(experiment.precision, CPU)
    loader: Any = ListedLoader(steps)
    prepared: Any = None
    return Run(experiment, model, prepared, loader, device=CPU, precision=precision)


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file without what depends on the clock."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def assert_same_weights(one: Run, other: Run) -> None:
    """Every parameter is bit for bit the same."""
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


def assert_same_state(one: Run, other: Run) -> None:
    """All that a checkpoint keeps is the same, bit for bit: weights, optimizer, generators, data position, counters."""
    (mine, my_document), (theirs, their_document) = flatten_state(one.state_dict()), flatten_state(other.state_dict())
    assert my_document == their_document
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
