"""Small data for the tests of the data layer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graft.config.experiment import DataConfig, Experiment
from graft.data.store import TokenStore
from graft.data.store_writer import StoreWriter

WORDS = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau").split()  # noqa: SIM905


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def data_config(path: Path | str, **changes: Any) -> DataConfig:
    source = {"type": "files", "path": str(path), **changes.pop("source", {})}
    settings = {"source": source, "tokenizer": {"type": "bytes"}, "seq_len": 16, **changes}
    return DataConfig.model_validate(settings)


def experiment(data: DataConfig, cache: Path, **changes: Any) -> Experiment:
    batch, micro, workers = changes.pop("batch", 4), changes.pop("micro", None), changes.pop("workers", 0)
    settings: dict[str, Any] = {
        "model": {
            "hidden_size": 8,
            "num_layers": 1,
            "norm": {"type": "rms_norm"},
            "blocks": {"b": [{"type": "mlp", "intermediate_size": 8}]},
        },
        "objective": {"type": "causal_lm"},
        "data": data.to_dict(),
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "schedule": {"type": "constant"},
        "training": {"max_steps": 1, "global_batch_size": batch, "micro_batch_size": micro},
        "runtime": {"cache_dir": str(cache), "data_workers": workers},
        **changes,
    }
    return Experiment.model_validate(settings)


def make_store(folder: Path, documents: Sequence[Sequence[int]], *, vocab_size: int = 1000, end: int = 0) -> TokenStore:
    writer = StoreWriter(folder, vocab_size=vocab_size, end_of_document=end)
    writer.append([np.array(ids, dtype=np.uint32) for ids in documents], 0)
    writer.finish()
    return TokenStore.open(folder)
