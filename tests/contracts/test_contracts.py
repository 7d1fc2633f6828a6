"""Every contract, on every variant's preset and on random compositions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from subjects import PRESETS, composed, compositions, experiment, load_shown, network_presets, subject

from graft.config.registry import PACKAGES, variants
from graft.contracts.registry import ALWAYS, BIDIRECTIONAL, CAUSAL, SLOW, contracts_for
from graft.contracts.subject import Subject
from graft.objectives.causal_lm_config import CausalLMConfig

FOLDERS = {family: package.split(".")[-1] for family, package in PACKAGES.items()}


def mixers_for_encoders() -> list[str]:
    """Token mixers whose preset can be an encoder."""
    parts = {
        tag: experiment(PRESETS / "token_mixers" / f"{tag}.yaml").model.layers() for tag in variants("token_mixer")
    }
    return [
        tag
        for tag, layers in parts.items()
        if all(getattr(part, "supports_bidirectional", True) for layer in layers for part in layer)
    ]


@cache
def encoder(mixer: str) -> Subject:
    """A token mixer's preset as an encoder."""
    shown = subject(PRESETS / "token_mixers" / f"{mixer}.yaml")
    return Subject(shown.config.replace(bidirectional=True), shown.objective)


@pytest.mark.parametrize("family", sorted(PACKAGES))
def test_every_variant_has_a_preset_that_uses_it(family: str) -> None:
    for tag in variants(family):
        path = PRESETS / FOLDERS[family] / f"{tag}.yaml"
        assert path.exists(), f"{family} '{tag}' needs the preset {path.relative_to(PRESETS.parent)}"
        assert f"'type': '{tag}'" in repr(experiment(path).to_dict())


@pytest.mark.parametrize("path", network_presets(), ids=lambda p: f"{p.parent.name}/{p.stem}")
@pytest.mark.parametrize("contract", sorted({*CAUSAL, *BIDIRECTIONAL, *ALWAYS}, key=lambda c: c.__name__))
def test_contract(contract: Callable[[Subject], None], path: Path) -> None:
    shown = subject(path)
    if contract in contracts_for(shown):
        contract(shown)


@pytest.mark.parametrize("mixer", mixers_for_encoders())
@pytest.mark.parametrize("contract", sorted({*BIDIRECTIONAL, *ALWAYS}, key=lambda c: c.__name__))
def test_contract_of_encoders(contract: Callable[[Subject], None], mixer: str) -> None:
    contract(encoder(mixer))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("mixer", mixers_for_encoders())
@pytest.mark.parametrize("contract", SLOW, ids=lambda c: c.__name__)
def test_slow_contract_of_encoders(contract: Callable[[Subject], None], mixer: str) -> None:
    contract(encoder(mixer))


@pytest.mark.slow
@pytest.mark.timeout(900)  # some mixers compile for a minute on a quiet machine
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("path", network_presets(), ids=lambda p: f"{p.parent.name}/{p.stem}")
@pytest.mark.parametrize("contract", SLOW, ids=lambda c: c.__name__)
def test_slow_contract(contract: Callable[[Subject], None], path: Path) -> None:
    contract(subject(path))


@pytest.fixture(scope="module")
def shown() -> None:
    load_shown()


def hold(data: dict[str, Any]) -> None:
    drawn = Subject(composed(data), CausalLMConfig(z_loss_coef=1e-3))
    for contract in contracts_for(drawn):
        contract(drawn)


@pytest.mark.usefixtures("shown")
@settings(max_examples=15)
@given(compositions())
def test_contracts_hold_for_any_composition(data: dict[str, Any]) -> None:
    hold(data)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a hundred networks, each trained and decoded several ways
@pytest.mark.usefixtures("shown")
@settings(max_examples=100)
@given(compositions())
def test_contracts_hold_for_many_compositions(data: dict[str, Any]) -> None:
    hold(data)
