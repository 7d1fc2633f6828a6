"""The model presets: exact sizes, and the choices they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.model import Model, build_model
from tiny_run import random_batch

MODELS = Path(__file__).parents[2] / "presets" / "models"

SIZES = {
    "toy54m_baseline": 54_538_752,
    "toy54m_gemma": 54_538_752,
    "gemma3_tinystories_132m": 132_490_496,
    "gemma3_270m": 268_098_176,
}


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(MODELS / f"{name}.yaml", list(overrides))


def on_meta(experiment: Experiment) -> Model:
    assert experiment.model.vocab_size is not None
    return build_model(experiment.model, experiment.model.vocab_size, seed=0, device="meta")


@pytest.mark.parametrize("name", SIZES)
def test_exact_parameter_counts(name: str) -> None:
    assert on_meta(load(name)).num_parameters() == SIZES[name]


def test_untied_gemma3_tinystories() -> None:
    untied = load("gemma3_tinystories_132m", "model.head.tie_word_embeddings=false")
    assert on_meta(untied).num_parameters() == 164_654_976


def test_sizes_in_the_comments_are_true() -> None:
    for name, size in SIZES.items():
        assert f"{size:,}" in (MODELS / f"{name}.yaml").read_text()


def test_the_two_toys_differ_in_the_levers_alone() -> None:
    baseline, gemma = load("toy54m_baseline"), load("toy54m_gemma")
    assert baseline.tokens_per_step == gemma.tokens_per_step == 131_072
    windows = [parts[0].sliding_window for parts in gemma.model.layers()]
    assert windows == [1024, None] * 6
    assert all(window is None or window < gemma.data.seq_len for window in windows)
    assert {parts[0].sliding_window for parts in baseline.model.layers()} == {None}
    assert (baseline.model.head.logit_softcap, gemma.model.head.logit_softcap) == (None, 30.0)
    assert (baseline.objective.z_loss_coef, gemma.objective.z_loss_coef) == (0.0, 1e-4)
    assert (baseline.optimizer.type, gemma.optimizer.type) == ("adamw", "muon")
    names = [name for name, _ in on_meta(baseline).named_parameters()]
    assert names == [name for name, _ in on_meta(gemma).named_parameters()]


SMALL = ("model.vocab_size=300", "data.tokenizer.vocab_size=290", "model.hidden_size=32", "data.seq_len=1025")
OFF = ("model.blocks.slide.0.sliding_window=null", "model.head.logit_softcap=null", "objective.z_loss_coef=0.0")


def test_levers_that_are_off_change_no_bit_of_the_loss_and_its_gradients() -> None:
    """At a width that is quick; the layers are the presets'."""
    batch, found = random_batch(2, 24, seed=0), []
    for name, changes in (("toy54m_baseline", ()), ("toy54m_gemma", OFF), ("toy54m_gemma", ())):
        experiment = load(name, *SMALL, *changes)
        model = build_model(experiment.model, 300, seed=0)
        loss = experiment.objective.build().loss(model, batch).main
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    plain, off, on = found
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))
    assert not torch.equal(plain[0], on[0])


@pytest.mark.parametrize("name", ["gemma3_tinystories_132m", "gemma3_270m"])
def test_gemma3_layers(name: str) -> None:
    experiment = load(name)
    layers = [parts[0] for parts in experiment.model.layers()]
    far = [i for i, attention in enumerate(layers) if attention.sliding_window is None]
    assert far == [5, 11, 17]
    thetas = {attention.sliding_window: attention.position.theta for attention in layers}
    assert thetas == {512: 1e4, None: 1e6}
    assert experiment.data.seq_len > 512


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda p: p.stem)
def test_tokenizers_fit_the_vocabulary(path: Path) -> None:
    experiment = load_experiment(path)
    rows, ids = experiment.model.vocab_size, getattr(experiment.data.tokenizer, "vocab_size", None)
    assert rows is None or ids is None or ids <= rows
