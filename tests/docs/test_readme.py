"""The README's blocks are run in order, as they stand; training commands get a smaller model and fewer steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from graft.config.load import load_experiment

ROOT = Path(__file__).parents[2]
SMALL = [
    *("model.hidden_size=16", "model.num_layers=3", "data.seq_len=32", "data.source.max_characters=60000"),
    *("data.tokenizer.vocab_size=300", "training.max_steps=3", "training.global_batch_size=2"),
    "evaluation.max_sequences=4",
]
"""Added to every ``graft train`` (and to the resume of it, which must be of the same run)."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    shown = commands()
    assert {c[1] for c in shown} >= {"check", "train", "generate", "eval", "report", "parts", "schema", "diff"}
    for command in shown:
        assert command[0] == "graft"
        small = SMALL if command[1] == "train" else []
        done = run(["-m", "graft", *command[1:3], *small, *command[3:]], tmp_path)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/demo/report.html").exists()
    assert (tmp_path / "graft.schema.json").exists()


def test_config_block_is_valid(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    path = tmp_path / "config.yaml"
    path.write_text(block)
    experiment = load_experiment(path)
    assert experiment.model.layer_blocks() == ("local", "global", "local", "global")


def test_error_block_is_what_is_printed(tmp_path: Path) -> None:
    """The first lines of the report shown, from the config shown with the mistake it names."""
    (block,) = blocks("yaml")
    path = tmp_path / "config.yaml"
    path.write_text(block.replace("num_heads: 4, sliding", "num_haeds: 4, sliding"))
    done = run(["-m", "graft", "check", "--static", "config.yaml"], tmp_path)
    (shown,) = blocks("text")
    assert done.returncode == 2
    for line in shown.splitlines():
        assert line in done.stderr, f"{line!r} is not in\n{done.stderr}"


@pytest.mark.slow
def test_python_block_runs(tmp_path: Path) -> None:
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    (block,) = blocks("python")
    done = run(["-c", block], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
