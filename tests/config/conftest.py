"""A small valid config as data, and a way to write files and read what is wrong with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.config.load import load_experiment
from graft.config.report import ConfigProblems

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "hidden_size": 16,
        "num_layers": 4,
        "norm": {"type": "rms_norm", "eps": 1e-6},
        "blocks": {
            "b": [
                {"type": "attention", "num_heads": 2, "position": {"type": "rope", "theta": 1e4}},
                {"type": "mlp", "intermediate_size": 32},
            ]
        },
    },
    "objective": {"type": "causal_lm"},
    "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 8},
    "optimizer": {"type": "adamw", "learning_rate": 1e-3},
    "schedule": {"type": "cosine", "warmup_steps": 2},
    "training": {"max_steps": 10, "global_batch_size": 4},
}

SMALL_YAML = """\
name: small
model:
  hidden_size: 16
  num_layers: 4
  norm: {type: rms_norm, eps: 1e-6}
  blocks:
    b:
      - {type: attention, num_heads: 2, position: {type: rope, theta: 1e4}}
      - {type: mlp, intermediate_size: 32}
objective: {type: causal_lm}
data: {source: {type: embedded}, tokenizer: {type: bytes}, seq_len: 8}
optimizer: {type: adamw, learning_rate: 1e-3}
schedule: {type: cosine, warmup_steps: 2}
training: {max_steps: 10, global_batch_size: 4}
"""


@pytest.fixture
def small() -> dict[str, Any]:
    """A fresh copy of a valid config."""
    return copy.deepcopy(SMALL)


@pytest.fixture
def small_yaml() -> str:
    """The same as YAML text."""
    return SMALL_YAML


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """``write(name, text)`` puts a file into the working directory of the test and returns its name."""
    monkeypatch.chdir(tmp_path)

    def writer(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return writer


@pytest.fixture
def problems() -> Callable[..., list[str]]:
    """``problems(path, *overrides)``: the lines of the report of a config that must be wrong."""

    def lines(path: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigProblems) as caught:
            load_experiment(path, overrides)
        return [str(problem) for problem in caught.value.problems]

    return lines
