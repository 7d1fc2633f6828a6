"""Faults 38-41: configs that are wrong, hostile, or both. Each has one defined answer: exit 2, one report, no torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.config.load import load_experiment
from graft.config.report import ConfigProblems

pytestmark = pytest.mark.fault

CONFIG = """\
name: small
model:
  hidden_size: 16
  num_layers: 4
  norm: {type: rms_norm}
  blocks:
    b:
      - {type: attention, num_heads: 2, position: {type: rope}}
      - {type: mlp, intermediate_size: 32}
objective: {type: causal_lm}
data: {source: {type: embedded}, tokenizer: {type: bytes}, seq_len: 8}
optimizer: {type: adamw, learning_rate: 1e-3}
schedule: {type: cosine, warmup_steps: 2}
training: {max_steps: 10, global_batch_size: 4}
"""

Report = Callable[..., list[str]]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """``report(text)``: the lines of the report about a config file with that text (or bytes)."""
    monkeypatch.chdir(tmp_path)

    def lines(text: str | bytes, name: str = "c.yaml") -> list[str]:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigProblems) as caught:
            load_experiment(name)
        assert caught.value.exit_code == 2
        return [str(p) for p in caught.value.problems]

    return lines


@pytest.mark.parametrize("verb", [["check", "--static"], ["check"], ["train"]], ids=" ".join)
def test_38_a_typo_is_placed_and_explained_before_torch_is_imported(tmp_path: Path, verb: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("hidden_size", "hiden_size"))
    code = (
        "import sys; from graft.cli.main import run; code = run(sys.argv[1:]);"
        "print('torch' in sys.modules); sys.exit(int(code))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, verb[0], "c.yaml", *verb[1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "error: c.yaml:3:3  model.hiden_size: unknown key; did you mean 'hidden_size'?\n"
    assert done.stdout == "False\n"


def test_39_many_mistakes_are_one_report(report: Report) -> None:
    text = CONFIG.replace("rms_norm", "rms_nrm").replace("max_steps: 10", "max_steps: ten").replace("8}", ".nan}")
    assert report(text + "name: again\nruntime: {compile: yes}\n") == [
        "c.yaml:5:16  model.norm.type: 'rms_nrm' is no known type; did you mean 'rms_norm'? "
        "(one of derf, dyt, layer_norm, rms_norm)",
        "c.yaml:11:69  data.seq_len: must be a whole number, not nan",
        "c.yaml:14:23  training.max_steps: must be a whole number, not 'ten'",
        "c.yaml:15:1  name: the key is given twice (first in line 1); keep one",
        "c.yaml:16:20  runtime.compile: must be true or false, not 'yes'; write true (YAML 1.2 reads yes as text)",
    ]


def test_39_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("1e-3", "1e-4"))
    assert load_experiment(path).to_dict()["optimizer"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONFIG.replace("  hidden_size", "\thidden_size"), "c.yaml:3:1  a tab cannot indent in YAML; use spaces"),
        (CONFIG.encode("utf-16"), "c.yaml:1:1  byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"name: caf\xe9\n", "c.yaml:1:10  byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("", "c.yaml:1  the file is empty"),
        ("\n\n  \n", "c.yaml:1  the file is empty"),
        ("- a\n- b\n", "c.yaml:1:1  the top level is a list; expected a table of keys"),
        (CONFIG.replace("1e-3", ".inf"), "c.yaml:12:41  optimizer.learning_rate: must be a finite number, not inf"),
        (
            CONFIG.replace("1e-3", "1e999"),
            "c.yaml:12:41  optimizer.learning_rate: '1e999' is no float: it does not fit",
        ),
        (CONFIG.replace("name: small", "name: !!python/name:os.system x"), "c.yaml:1:7  name: the YAML tag "),
    ],
    ids=["tab", "utf-16", "latin-1", "empty", "blank", "list", "inf", "overflow", "tag"],
)
def test_39_each_kind_of_broken_file_has_one_answer(report: Report, text: str | bytes, expected: str) -> None:
    (line,) = report(text)
    assert line.startswith(expected), line


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("hidden_size: 16", "hidden_size: 17", "num_heads 2 does not divide hidden_size 17"),
        ("warmup_steps: 2", "warmup_steps: 2, min_lr_ratio: 1.5", "schedule.min_lr_ratio: must be at most 1, not 1.5"),
        ("warmup_steps: 2", "warmup_steps: 11", "warm-up of 11 steps exceeds max_steps 10"),
        ("  norm:", "  layout: [b, b, b]\n  norm:", "a layout of 3 layers does not repeat to num_layers = 4"),
    ],
    ids=["heads", "floor above peak", "warm-up", "layout"],
)
def test_40_cross_field_messages_name_both_values(report: Report, old: str, new: str, expected: str) -> None:
    (line,) = report(CONFIG.replace(old, new))
    assert expected in line


def quickly(report: Report, text: str, name: str = "c.yaml", seconds: float = 5.0) -> list[str]:
    start = time.perf_counter()
    lines = report(text, name)
    assert time.perf_counter() - start < seconds
    return lines


def test_41_alias_bombs_are_refused(report: Report) -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    bomb = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(levels) + "\n"
    (line,) = quickly(report, bomb)
    assert "values once aliases are expanded" in line
    (line,) = quickly(report, "a: &a [*a]\n")  # an alias of itself
    assert "too deep" in line


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_41_deep_nesting_is_refused(report: Report, name: str) -> None:
    for depth in (60, 100_000):
        brackets = "[" * depth + "]" * depth
        (line,) = quickly(report, f'{{"a": {brackets}}}', name)
        assert "too deep" in line
    (line,) = quickly(report, f"a = {'[' * 500}{']' * 500}\n", "c.toml")
    assert "too deep" in line


def test_41_huge_files_are_refused_without_being_read(report: Report) -> None:
    (line,) = quickly(report, "a: 1\n" * 2_000_000)
    assert "larger than 256 KiB" in line


def test_41_huge_models_are_refused(report: Report) -> None:
    (line,) = quickly(report, CONFIG.replace("num_layers: 4", "num_layers: 1000000000"))
    assert line == "c.yaml:4:15  model.num_layers: must be at most 100000, not 1000000000"
    runs = ", ".join(["{block: b, repeat: 100000}"] * 1000)
    (line,) = quickly(report, CONFIG.replace("  norm:", f"  layout: [{runs}]\n  norm:"))
    assert "a layout of 100000000 layers does not repeat to num_layers = 4" in line


def test_41_circles_of_bases_are_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("seed: 1\nbase: c.yaml\n")
    (line,) = quickly(report, "base: b.yaml\n")
    assert line == "b.yaml:2:7  base: the bases form a circle: c.yaml -> b.yaml -> c.yaml; break it"
    (line,) = quickly(report, "base: c.yaml\n")
    assert "c.yaml -> c.yaml" in line
    for i in range(20):
        (tmp_path / f"n{i}.yaml").write_text(f"base: n{i + 1}.yaml\n")
    (line,) = quickly(report, "base: n0.yaml\n")
    assert "more than 16 bases in a chain" in line
