"""One small preset per token mixer: the default preset with another mixer, and an mlp that keeps its size."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import cast

import pytest
import torch

from graft.api import train
from graft.config.advice import warnings
from graft.config.families import TokenMixerConfig
from graft.config.fields import tag_of
from graft.config.load import load_experiment
from graft.config.registry import variants
from graft.model import build_model
from graft.report.baselines import measure_baselines

MODELS = Path(__file__).parents[2] / "presets" / "models"
DEFAULT = MODELS / "default.yaml"
FREE = {"attention", "identity"}
"""Mixers without a preset of their own: the default preset's, and the control that mixes nothing."""
NAMES = [*sorted(set(variants("token_mixer")) - FREE), "attention_hope", "attention_xpos"]
SMALL = [MODELS / f"{name}_small.yaml" for name in NAMES]


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_it_is_the_default_preset_with_another_mixer(path: Path) -> None:
    ours, default = load_experiment(path), load_experiment(DEFAULT)
    assert warnings(ours) == []
    assert ours.name == path.stem
    for field in ("objective", "data", "optimizer", "schedule", "precision", "seed", "evaluation"):
        assert getattr(ours, field) == getattr(default, field), field
    batch = ours.training.model_dump(exclude={"max_steps"})
    assert batch == default.training.model_dump(exclude={"max_steps"})
    assert ours.max_steps <= default.max_steps
    rest = ours.model.model_dump(exclude={"blocks", "layout"})
    assert rest == default.model.model_dump(exclude={"blocks", "layout"})
    sizes = [build_model(e.model, 2048, seed=0, device="meta").num_parameters() for e in (ours, default)]
    assert 0.85 * sizes[1] <= sizes[0] <= 1.15 * sizes[1]


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_its_comment_says_what_differs(path: Path) -> None:
    """Everything but mixers and layout is the default's, where the comment says so; else the mlp alone is narrower."""
    channel = [
        [part.model_dump() for parts in load_experiment(p).model.layers() for part in parts if not is_mixer(part)]
        for p in (path, DEFAULT)
    ]
    comment = path.read_text().partition("base:")[0]
    assert ("only the token mixer differs" in comment) == (channel[0] == channel[1])
    if channel[0] != channel[1]:
        assert "narrower" in comment
        assert all(
            ours["intermediate_size"] < theirs["intermediate_size"] for ours, theirs in zip(*channel, strict=True)
        )


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_it_mixes_with_what_its_name_says(path: Path) -> None:
    name = path.stem.removesuffix("_small")
    mixers = [part for parts in load_experiment(path).model.layers() for part in parts if is_mixer(part)]
    if name.startswith("attention_"):
        positions = {part.model_dump()["position"]["type"] for part in mixers}
        assert positions == {name.removeprefix("attention_")}
    else:
        named = sum(tag_of(type(part)) == name for part in mixers)
        assert named == (len(mixers) if name != "conv" else 2 * len(mixers) / 3)  # its every third layer attends


def is_mixer(part: object) -> bool:
    return isinstance(part, TokenMixerConfig)


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_it_builds_and_predicts(path: Path) -> None:
    experiment = load_experiment(path, ["model.num_layers=3"])
    model = build_model(experiment.model, 31, seed=0)
    ids = torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (1, 9, 31)
    assert logits.isfinite().all()


@pytest.mark.slow
def test_one_of_them_learns(tmp_path: Path) -> None:
    """Sixty short steps on bytes take a narrow part of the preset below counting bytes."""
    overrides = [
        "model.num_layers=1",
        "data.tokenizer.type=bytes",
        "data.seq_len=64",
        "data.source.max_characters=300000",
        "training.max_steps=60",
        "training.global_batch_size=16",
        "evaluation.max_sequences=32",
        f"runtime.cache_dir={tmp_path / 'cache'}",
    ]
    experiment = load_experiment(MODELS / "retention_small.yaml", overrides)
    train(experiment, out=tmp_path / "run", stream=io.StringIO())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [cast(float, line["bpb"]) for line in lines if line["kind"] == "eval"]
    assert found[-1] < measure_baselines(experiment)["unigram"] < found[0]
