"""``graft check --contracts``: says what holds, and fails when something does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graft.cli.check import app
from graft.contracts.registry import ALWAYS, CAUSAL
from graft.ops.attention_mask import Visibility

PRESET = str(Path(__file__).parents[2] / "presets/models/llama_tiny.yaml")
SMALL = ["model.num_layers=1", "model.hidden_size=16"]


def test_every_contract_is_reported() -> None:
    result = CliRunner().invoke(app, [PRESET, *SMALL, "--contracts", "--json"])
    assert result.exit_code == 0, result.output
    verdicts = json.loads(result.stdout)["contracts"]
    assert {v["contract"] for v in verdicts} == {c.__name__ for c in (*CAUSAL, *ALWAYS)}
    assert all(v["problem"] is None and v["claim"] for v in verdicts)


def test_a_broken_contract_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Visibility.__init__

    def planted(self: Visibility, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        object.__setattr__(self, "causal", False)

    monkeypatch.setattr(Visibility, "__init__", planted)
    result = CliRunner().invoke(app, [PRESET, *SMALL, "--contracts"])
    assert result.exit_code == 1
    assert re.search(r"broken  never_looks_ahead: position \d+ sees position \d+", result.stdout)
