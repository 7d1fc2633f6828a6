"""Every part with ternary maps: nobody sees what comes later, or another document."""

from __future__ import annotations

from pathlib import Path

import pytest
from subjects import network_presets, subject

from graft.contracts import sequence
from graft.contracts.subject import Subject
from graft.linears.bitlinear import TernaryOperands
from graft.linears.bitlinear_config import BitLinearConfig

PARTS = [p for p in network_presets() if p.parent.name in ("token_mixers", "channel_mixers", "memories")]


def ternary(path: Path) -> Subject:
    shown = subject(path)
    return Subject(shown.config.replace(linear=BitLinearConfig()), shown.objective)


@pytest.mark.parametrize("path", PARTS, ids=lambda p: p.stem)
def test_causal_and_packed(path: Path) -> None:
    shown = ternary(path)
    made = any(isinstance(m, TernaryOperands) for m in shown.model.modules())
    assert made or path.stem == "identity"
    if not shown.config.bidirectional:
        sequence.never_looks_ahead(shown)
    sequence.documents_do_not_meet(shown)
    sequence.padding_does_not_matter(shown)


@pytest.mark.slow
@pytest.mark.parametrize("path", PARTS, ids=lambda p: p.stem)
def test_decoding(path: Path) -> None:
    shown = ternary(path)
    if not shown.config.bidirectional:
        sequence.decoding_equals_forward(shown)
        sequence.batched_decoding_equals_single(shown)
