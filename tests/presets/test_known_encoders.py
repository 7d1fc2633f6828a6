"""The presets of known encoders have the size and layers that transformers gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.model import build_model

MODELS = Path(__file__).parents[2] / "presets" / "models"

ALBERT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}

KNOWN: dict[str, tuple[Any, Any, int]] = {
    "bert_base": (BertForMaskedLM, BertConfig(), 768),
    "albert_base": (AlbertForMaskedLM, AlbertConfig(**ALBERT), 128),
    "modernbert_base": (ModernBertForMaskedLM, ModernBertConfig(), 0),
}
"""Preset -> transformers' class, its config, parameters of the token type that is not here."""


def load(name: str) -> Experiment:
    return load_experiment(MODELS / f"{name}.yaml")


@pytest.mark.parametrize("name", KNOWN)
def test_sizes(name: str) -> None:
    kind, config, unused = KNOWN[name]
    with torch.device("meta"):
        theirs = kind(config)
    expected = sum(p.numel() for p in theirs.parameters()) - unused
    model = load(name).model
    assert model.vocab_size == config.vocab_size
    assert build_model(model, config.vocab_size, seed=0, device="meta").num_parameters() == expected
    assert f"{expected:,}" in (MODELS / f"{name}.yaml").read_text()


def test_layers_of_modernbert() -> None:
    config = KNOWN["modernbert_base"][1]
    layers = [parts[0] for parts in load("modernbert_base").model.layers()]
    far = [kind == "full_attention" for kind in config.layer_types]
    assert [part.sliding_window is None for part in layers] == far
    assert {part.sliding_window for part in layers} == {None, config.local_attention // 2 + 1}
    kinds = {True: "full_attention", False: "sliding_attention"}
    thetas = [config.rope_parameters[kinds[is_far]]["rope_theta"] for is_far in far]
    assert [part.position.theta for part in layers] == thetas
    assert [part.norm_placement for part in layers] == ["none"] + [None] * (len(layers) - 1)
