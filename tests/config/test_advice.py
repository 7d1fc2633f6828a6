"""Advice about configs that are valid but odd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.config.advice import warnings
from graft.config.load import load_experiment_from_dict
from graft.model import build_model


def test_an_ordinary_config_needs_no_advice(small: dict[str, Any]) -> None:
    assert warnings(load_experiment_from_dict(small)) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.blocks.b.0.sliding_window=8"], "model.blocks.b.0.sliding_window: a window of 8 is not shorter than"),
        (["model.overrides.1.attention.sliding_window=9"], "model layer 1: a window of 9 is not shorter than"),
        (["schedule.warmup_steps=0"], "schedule: no warm-up with adamw"),
        (
            ["optimizer.type=muon", "optimizer.learning_rate=1", "schedule={type: constant}"],
            "schedule: no warm-up with muon",
        ),
        (["schedule.warmup_steps=10"], "schedule: the warm-up of 10 steps is the whole run"),
        (
            ["training.max_steps=null", "training.max_tokens=100"],
            "training.max_tokens: 100 is rounded down to 96 (3 steps)",
        ),
        (["evaluation.interval=11"], "evaluation.interval: 11 is more than the run's 10 steps"),
        (["checkpoint.interval=11"], "checkpoint.interval: 11 is more than the run's 10 steps"),
        (["model.bidirectional=true"], "objective: causal_lm does not train an encoder"),
        (["logging.dead_after=7"], "logging.dead_after: no part of the model counts what it chooses"),
        (["logging.usage_interval=null"], "logging.usage_interval: no part of the model counts"),
    ],
)
def test_each_oddity_has_one_line(small: dict[str, Any], overrides: list[str], expected: str) -> None:
    found = warnings(load_experiment_from_dict(small, overrides))
    assert [line.startswith(expected) for line in found] == [True], found


@pytest.mark.parametrize(
    ("part", "counts"),
    [
        ("{type: moe, num_experts: 4, intermediate_size: 8}", True),
        ("{type: peer, product_key_dims: [4, 4], num_experts_per_tok: 2, num_heads: 1, query_dim: 8}", True),
        ("{type: peer, product_key_dims: [4, 4], num_experts_per_tok: 2, num_heads: 1, track_usage: false}", False),
        ("{type: memory_bank, num_slots: 8, num_heads: 2, num_chapters: 4, top_k_chapters: 2}", True),
        ("{type: memory_bank, num_slots: 8, num_heads: 2}", False),
        ("{type: ode, branches: [{type: memory_bank, num_chapters: 4, chapter_size: 2, num_heads: 2}]}", True),
    ],
)
def test_telemetry_is_for_models_that_count(small: dict[str, Any], part: str, counts: bool) -> None:
    experiment = load_experiment_from_dict(small, [f"model.blocks.b.1={part}", "logging.dead_after=7"])
    model = build_model(experiment.model, 13, seed=0).train()
    assert bool(model.features(torch.zeros(1, 4, dtype=torch.int64)).usage) == counts
    assert any(line.startswith("logging.dead_after") for line in warnings(experiment)) != counts


def test_a_window_shorter_than_the_sequence_is_fine(small: dict[str, Any]) -> None:
    assert warnings(load_experiment_from_dict(small, ["model.blocks.b.0.sliding_window=7"])) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (["blocks.b.0.position={type: none}"], 1),
        (["blocks.b.0={type: identity}"], 1),
        (["blocks.b.0={type: ode, mixer: {type: attention, num_heads: 2, position: {type: none}}}"], 1),
        (["blocks.b.0={type: ode, mixer: {type: attention, num_heads: 2, position: {type: rope}}}"], 0),
        (["blocks.b.0={type: mamba2, head_dim: 8}"], 0),
        (["blocks.b.0={type: retention, num_heads: 2}"], 0),
        (["blocks.b.0={type: gla, num_heads: 2}"], 0),
        (["blocks.b.0.position={type: none}", "embedding.position={type: learned, max_seq_len: 8}"], 0),
        (["blocks.b.0.position={type: none}", "embedding.conv={kernel_size: 3}"], 0),
    ],
)
def test_an_encoder_without_order_is_a_bag_of_words(small: dict[str, Any], changes: list[str], lines: int) -> None:
    found = warnings(load_experiment_from_dict(small, [f"model.{c}" for c in ("bidirectional=true", *changes)]))
    assert sum("nothing tells positions apart" in line for line in found) == lines
