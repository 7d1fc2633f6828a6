"""Advice about configs that are valid but odd."""

from __future__ import annotations

from typing import Any

import pytest

from graft.config.advice import warnings
from graft.config.load import load_experiment_from_dict


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
    ],
)
def test_each_oddity_has_one_line(small: dict[str, Any], overrides: list[str], expected: str) -> None:
    found = warnings(load_experiment_from_dict(small, overrides))
    assert [line.startswith(expected) for line in found] == [True], found


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
