"""Variants of a person's own at the command line: found from the working directory, their errors named as theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.cli.main import run
from graft.errors import ExitCode

OWN = '''\
from typing import Literal

from graft.config.families import TokenMixerConfig
from graft.part import Part, PartOutput


class HalfConfig(TokenMixerConfig):
    """Half of the stream."""

    implementation = "own_half:Half"
    type: Literal["own_half"] = "own_half"


class Half(Part):
    def __init__(self, config, site):
        super().__init__()
        self.config = config

    def forward(self, x_BTD, ctx, state=None):
        return PartOutput(x_BTD / 2)

    def flops_per_token(self, seq_len):
        return 0.0
'''

CONFIG = """\
base: presets/models/llama_tiny.yaml
plugins: [own_half]
model: {hidden_size: 16, num_layers: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry_restored: None) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the installed command has it
    yield tmp_path
    sys.modules.pop("own_half", None)


@pytest.mark.parametrize("verb", [["parts", "own_half"], ["schema"]])
def test_a_plugin_of_the_working_directory_is_found(
    verb: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own_half.py").write_text(OWN)
    assert run([*verb, "--plugin", "own_half"]) == 0
    assert "Half of the stream." in capsys.readouterr().out


def test_an_error_in_own_code_is_no_bug_of_ours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own_half.py").write_text(OWN.replace("x_BTD / 2", "x_BTD / missing"))
    (folder / "own.yaml").write_text(CONFIG)
    swapped = "model.blocks.decoder.0={type: own_half}"
    assert run(["check", "own.yaml", swapped, "--contracts"]) == ExitCode.INTERNAL
    said = capsys.readouterr().err
    line = 1 + OWN[: OWN.index("x_BTD / 2")].count("\n")
    assert f"NameError: name 'missing' is not defined (in {folder / 'own_half.py'}:{line}, a plug-in; " in said
    assert "bug in graft" not in said
    Path(said.split("the traceback is in ")[1].rstrip(")\n")).unlink()
