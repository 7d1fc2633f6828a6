"""``graft train`` ends by saying how the run stands beside the untrained model and counting."""

from __future__ import annotations

from typer.testing import CliRunner

from graft.cli.train import app
from graft.config.identity import resolved_yaml


def test_the_last_lines_compare_the_run(tiny, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(resolved_yaml(tiny("training.max_steps=2")))
    result = CliRunner().invoke(app, [str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    *_, first, second, third, last, page = result.stdout.splitlines()
    figures = [float(line.split()[0]) for line in (first, second, third, last)]
    assert figures == sorted(figures)
    named = {line.split("bits per byte")[1].strip() for line in (first, second, third, last)}
    assert named == {"this run", "untrained", "unigram", "5-gram"}
    assert page == str(tmp_path / "run" / "report.html")
