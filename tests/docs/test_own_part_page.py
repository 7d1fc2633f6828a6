"""docs/own_part.md: its blocks are run in order, as they stand; training gets fewer steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graft.config.load import load_experiment
from graft.config.roles import ROLES
from graft.contracts.registry import Verdict, examine
from graft.contracts.subject import Subject
from graft.model import build_model
from graft.part import Context

PAGE = (Path(__file__).parents[2] / "docs" / "own_part.md").read_text()
FEWER = ["training.max_steps=6", "evaluation.interval=3", "evaluation.max_sequences=4"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    part, compare = blocks("python")
    (config,) = blocks("yaml")
    for name, text in {"ema.py": part, "compare.py": compare, "mine.yaml": config}.items():
        assert f"`{name}`" in PAGE
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def _forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch, registry_restored: None) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("ema", None)


def verdicts(folder: Path) -> dict[str, Verdict]:
    return {v.contract: v for v in examine(Subject.of(load_experiment(folder / "mine.yaml")))}


@pytest.mark.usefixtures("_forgotten")
def test_the_part_computes_what_is_written(folder: Path) -> None:
    """Against the formula, position by position."""
    model = build_model(load_experiment(folder / "mine.yaml").model, 257, seed=0)
    part = next(part for part in model.parts() if type(part).__name__ == "Ema")
    map_DD = part.get_parameter("o_proj.weight")
    x_BTD = torch.randn(2, 20, 64)
    a_D = torch.full((64,), 0.8)
    h_BD = torch.zeros(2, 64)
    expected: list[torch.Tensor] = []
    for x_BD in x_BTD.unbind(1):
        h_BD = a_D * h_BD + (1 - a_D) * x_BD
        expected.append(h_BD @ map_DD.T)
    ids_BT = torch.zeros(2, 20, dtype=torch.int64)
    torch.testing.assert_close(part(x_BTD, Context(ids_BT, ids_BT)).y, torch.stack(expected, 1))


@pytest.mark.usefixtures("_forgotten")
def test_the_part_holds_every_contract(folder: Path) -> None:
    assert [v for v in verdicts(folder).values() if v.problem is not None] == []


@pytest.mark.usefixtures("_forgotten")
def test_a_part_that_reads_over_borders_breaks_the_contracts_the_page_names(folder: Path) -> None:
    part = folder / "ema.py"
    part.write_text(part.read_text().replace("if documents is not None:", "if False:"))
    broken = {name for name, verdict in verdicts(folder).items() if verdict.problem is not None}
    assert broken == {"documents_do_not_meet", "padding_does_not_matter", "batched_decoding_equals_single"}


def test_what_the_page_names_exists() -> None:
    assert {"other", "scalar", *re.findall(r'role="(\w+)"', PAGE)} <= set(ROLES)
    root = Path(__file__).parents[2]
    assert all((root / "src" / name).exists() for name in re.findall(r"`(graft/[\w/]+\.py)`", PAGE))


@pytest.mark.slow
def test_commands_run_as_they_stand(folder: Path) -> None:
    shown = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert [command[1] for command in shown] == ["parts", "check", "check", *["train"] * 4, "diff"]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PATH": tools}

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    said = [run([*command, *(FEWER if command[1] == "train" else [])]) for command in shown]
    assert "decay at the start" in said[0]
    assert "holds   documents_do_not_meet" in said[1]
    assert "broken" not in said[1] + said[2]
    differing = re.findall(r"^\W*(\w+(?:\.\w+)+)", said[-1], re.MULTILINE)
    assert "model.blocks.block.0.start" in differing
    assert all(field.startswith("model.blocks.block.0.") for field in differing)
    assert re.search(r"ema against conv: [+-]\d\.\d{4} bits per byte", run([sys.executable, "compare.py"]))
