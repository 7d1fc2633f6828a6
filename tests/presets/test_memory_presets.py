"""The presets with memories: exact sizes, and what they have in common with those without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.cost.counts import parameters_by_role
from graft.model import Model, build_model

MODELS = Path(__file__).parents[2] / "presets" / "models"
SIZES = {"moc_vanilla": 137_841_408, "moc_base_small": 169_455_552, "toy54m_gemma_engram": 55_849_984}


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(MODELS / f"{name}.yaml", list(overrides))


def built(experiment: Experiment, device: str = "meta") -> Model:
    assert experiment.model.vocab_size is not None
    return build_model(experiment.model, experiment.model.vocab_size, seed=0, device=device)


@pytest.mark.parametrize("name", SIZES)
def test_exact_parameter_counts(name: str) -> None:
    assert built(load(name)).num_parameters() == SIZES[name]
    assert f"{SIZES[name]:,}" in (MODELS / f"{name}.yaml").read_text()


def test_the_memory_is_all_that_the_moc_models_differ_in() -> None:
    vanilla, memory = load("moc_vanilla"), load("moc_base_small")
    differing = {"model", "name"}
    assert {k: v for k, v in vanilla.to_dict().items() if k not in differing} == {
        k: v for k, v in memory.to_dict().items() if k not in differing
    }
    names = dict(built(vanilla).named_parameters()).keys()
    more = dict(built(memory).named_parameters()).keys() - names
    assert names <= dict(built(memory).named_parameters()).keys()
    assert all("memory_bank" in name or name == "shared.bank.slots" for name in more)
    without = load("moc_base_small", "model.blocks.main.1.layers=none")
    assert built(without).num_parameters() == SIZES["moc_vanilla"]
    assert parameters_by_role(built(memory))["memory_bank"] == 4096 * 768


SMALL = ("model.vocab_size=300", "data.tokenizer.vocab_size=290", "model.hidden_size=32", "data.seq_len=1025")


def test_the_engram_starts_as_the_model_without_it_bit_for_bit() -> None:
    """At a width that is quick; the layers and the memory are the preset's."""
    engram, plain = load("toy54m_gemma_engram", *SMALL), load("toy54m_gemma", *SMALL)
    parts = [[type(part).__name__ for part in layer] for layer in engram.model.layers()]
    assert [i for i, layer in enumerate(parts) if layer[-1] == "MemoryBankConfig"] == [6]
    assert [[name for name in layer if name != "MemoryBankConfig"] for layer in parts] == [
        [type(part).__name__ for part in layer] for layer in plain.model.layers()
    ]
    ids = torch.randint(300, (1, 12))
    with torch.no_grad():
        assert torch.equal(built(engram, "cpu")(ids), built(plain, "cpu")(ids))


@pytest.mark.slow
def test_the_engram_starts_as_the_model_without_it_at_full_size() -> None:
    ids = torch.randint(8192, (1, 8))
    with torch.no_grad():
        logits = [built(load(name), "cpu")(ids) for name in ("toy54m_gemma_engram", "toy54m_gemma")]
    assert torch.equal(*logits)
