"""The tiny Mixtral: what it shares with the tiny Llama, and that it trains."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from graft import api
from graft.config.load import load_experiment
from graft.cost.counts import part_costs
from graft.model import Model, build_model

MODELS = Path(__file__).parents[2] / "presets" / "models"
ROUTER = 128 * 8


def on_meta(name: str) -> Model:
    return build_model(load_experiment(MODELS / f"{name}.yaml").model, 2048, seed=0, device="meta")


def mixers(name: str, kind: str) -> list[Any]:
    model = on_meta(name)
    return [cost for cost in part_costs(model, 256, next(model.parameters()).dtype) if cost.type == kind]


def test_as_many_weights_per_position_and_four_times_as_many_in_all() -> None:
    for expert, dense in zip(mixers("mixtral_tiny", "moe"), mixers("llama_tiny", "mlp"), strict=True):
        assert expert.active_parameters - ROUTER == dense.parameters
        assert expert.parameters - ROUTER == 4 * dense.parameters
        assert expert.forward_flops_per_token == dense.forward_flops_per_token + 2 * ROUTER


def test_the_rest_is_the_tiny_llama() -> None:
    expert, dense = (load_experiment(MODELS / f"{name}.yaml").to_dict() for name in ("mixtral_tiny", "llama_tiny"))
    expert["model"]["blocks"]["decoder"][1] = dense["model"]["blocks"]["decoder"][1]
    differing = {key for key in expert if expert[key] != dense[key]}
    assert differing == {"name", "logging"}


@pytest.mark.slow
def test_trains_on_the_embedded_corpus(tmp_path: Path) -> None:
    overrides = [
        "data.tokenizer={type: bytes}", "data.source.max_characters=60000", "data.seq_len=64", "model.hidden_size=64",
        "training={max_steps: 40, global_batch_size: 8}", "schedule.warmup_steps=5", "logging.usage_interval=20",
        "evaluation.max_sequences=16", f"runtime.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    experiment = load_experiment(MODELS / "mixtral_tiny.yaml", overrides)
    api.train(experiment, out=tmp_path / "run", stream=io.StringIO())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert losses[-1] < losses[0] - 1.5
    usage = [line for line in lines if line["kind"] == "usage"]
    assert len(usage) == 2 * 4
    assert all(line["coverage"] == 1.0 for line in usage)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("layers.3.moe.experts") >= 2
