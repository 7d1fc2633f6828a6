"""Settings every test runs under: one thread, fixed seeds, deterministic hypothesis, checked shapes."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

import graft.shapes
from graft.config import registry
from graft.faults import reset_faults

torch.set_num_threads(1)  # tests run side by side, and tiny tensors gain nothing from more

hypothesis.settings.register_profile("graft", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("graft")

CHECKED = (
    "graft.model",
    "graft.network",
    "graft.ops.attention",
    "graft.ops.cross_entropy",
    "graft.norms",
    "graft.linears",
    "graft.positions",
    "graft.token_mixers",
    "graft.channel_mixers",
    "graft.memories",
    "graft.objectives",
)
"""Modules whose annotated shapes are checked at every call, unless GRAFT_CHECK_SHAPES=0; custom operators cannot be."""

if os.environ.get("GRAFT_CHECK_SHAPES", "1") != "0":
    graft.shapes.Bool, graft.shapes.Float, graft.shapes.Int = jaxtyping.Bool, jaxtyping.Float, jaxtyping.Int
    jaxtyping.install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def compiling() -> Iterator[None]:
    """For tests that call torch.compile: shape checks off (they cannot be traced), PyTorch's own warnings let pass."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*script_method", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def registry_restored() -> Iterator[None]:
    """Forgets the variants a test registers."""
    registry.discover()  # or the built-in variants would be forgotten with them
    before = {family: dict(members) for family, members in registry._variants.items()}
    yield
    for family, members in before.items():
        registry._variants[family].clear()
        registry._variants[family].update(members)


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the faults that ``GRAFT_FAULT`` describes, from now to the end of the test."""

    def set_faults(text: str) -> None:
        reset_faults()
        monkeypatch.setenv("GRAFT_FAULT", text)

    yield set_faults
    monkeypatch.delenv("GRAFT_FAULT", raising=False)
    reset_faults()
