"""The command line without torch: verbs found by file, help, static verbs, errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

import graft.cli
from graft.cli import main
from graft.config.load import load_experiment
from graft.errors import DataError, ExitCode

CONFIG = """\
name: small
model:
  hidden_size: 16
  num_layers: 2
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

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "pyarrow")

PROBE = f"""
import sys
from graft.cli.main import run
code = run(sys.argv[1:])
print("HEAVY", sorted(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
print("RICH", "rich" in sys.modules, "PYDANTIC", "pydantic" in sys.modules, file=sys.stderr)
raise SystemExit(int(code))
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A valid config in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    return "small.yaml"


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a fresh interpreter that tells which heavy modules it loaded."""
    env = {**os.environ, "NO_COLOR": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, env=env, timeout=60
    )


LIMIT_S = 0.4

STATIC = [
    ("--help",),
    ("check", "--help"),
    ("check", "small.yaml", "--static"),
    ("check", "small.yaml", "--static", "--json"),
    ("parts",),
    ("parts", "attention", "--json"),
    ("schema",),
    ("diff", "small.yaml", "small.yaml"),
]


@pytest.mark.parametrize("arguments", STATIC, ids=" ".join)
@pytest.mark.usefixtures("config")
def test_static_verbs_load_no_torch(arguments: tuple[str, ...]) -> None:
    done = process(*arguments)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr
    assert done.stdout.strip()


def test_help_loads_neither_configs_nor_rich_and_names_every_verb() -> None:
    done = process("--help")
    assert "RICH False PYDANTIC False" in done.stderr
    for verb in main.verbs():
        assert re.search(rf"^  {verb}  +\S", done.stdout, re.MULTILINE), verb


def test_the_probe_sees_what_is_loaded() -> None:
    probe = PROBE.replace("code = run", "import numpy; code = run")
    done = subprocess.run([sys.executable, "-c", probe, "--version"], capture_output=True, text=True, timeout=60)
    assert "HEAVY ['numpy']" in done.stderr


@pytest.mark.usefixtures("config")
def test_static_verbs_are_quick() -> None:
    """Processor time, not time on the clock: the machine may be busy."""
    for arguments in (("--help",), ("check", "small.yaml", "--static"), ("schema",)):
        seconds: list[float] = []
        while len(seconds) < 4 and not (seconds and seconds[-1] < LIMIT_S):
            before = os.times()
            process(*arguments)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            seconds.append(used)
        assert min(seconds) < LIMIT_S, (arguments, seconds)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out = capsys.readouterr()
    return int(code), out.out, out.err


def test_check_prints_identity_as_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", config, "--static", "--json", "schedule.warmup_steps=0")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["valid"], report["max_steps"], report["tokens_per_step"]) == (True, 10, 32)
    assert report["id"] == f"small-{report['hash'][:8]}"
    assert [w.split(":")[0] for w in report["warnings"]] == ["schedule"]


def test_check_prints_text_and_warnings(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", config, "--static", "schedule.warmup_steps=0")
    assert code == 0
    assert re.match(r"small-[0-9a-f]{8}: valid\n10 steps of 32 tokens\nwarning: schedule: no warm-up", out)
    assert "\x1b" not in out


def test_errors_are_one_report_and_exit_2(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", config, "--static", "sed=1", "precision=fp8")
    assert (code, out) == (2, "")
    assert err.startswith("error: 2 problems in the config\noverride 'precision=fp8'  precision: must be one of")
    assert "did you mean 'seed'?" in err
    assert "Traceback" not in err


def test_errors_as_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config).write_text(CONFIG.replace("hidden_size: 16", "hiden_size: 16"))
    code, out, err = run(capsys, "check", config, "--json")
    assert (code, err) == (2, "")
    assert json.loads(out) == {
        "valid": False,
        "errors": [
            {
                "file": "small.yaml",
                "line": 3,
                "col": 3,
                "path": "model.hiden_size",
                "problem": "unknown key",
                "fix": "did you mean 'hidden_size'?",
            }
        ],
    }
    code, out, _ = run(capsys, "check", "missing.yaml", "--json")
    assert code == 2
    assert json.loads(out)["errors"][0]["problem"] == "the config does not exist"


def test_what_only_building_the_model_shows_is_an_error_as_json_too(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = "runtime.kernels=fla"
    code, out, err = run(capsys, "check", config, "--json", kernel)
    (error,) = json.loads(out)["errors"]
    assert (code, err) == (2, "")
    assert (error["path"], error["line"]) == ("runtime.kernels", None)
    assert error["problem"].startswith("the kernel 'fla' computes")
    assert error["fix"] == "set runtime.kernels: auto"
    assert run(capsys, "check", config, kernel)[0] == 2


@pytest.mark.usefixtures("config")
def test_layers_that_cannot_mix_values_are_found_without_building_them(tmp_path: Path) -> None:
    one = "- {type: attention, num_heads: 2, position: {type: rope}}"
    passing = one.replace("}}", "}, value_residual: true}")
    both = f"{passing}\n    c:\n      {passing.replace('2', '1')}"
    (tmp_path / "mixed.yaml").write_text(CONFIG.replace(one, both).replace("  blocks:", "  layout: [b, c]\n  blocks:"))
    done = process("check", "mixed.yaml", "--static")
    assert (done.returncode, done.stdout) == (2, "")
    assert "HEAVY []" in done.stderr
    assert done.stderr.startswith("error: mixed.yaml:11:9  model.blocks.c.0: layer 1: value_residual of heads")


@pytest.mark.usefixtures("config")
def test_static_does_not_go_with_contracts() -> None:
    done = process("check", "small.yaml", "--static", "--contracts")
    assert (done.returncode, done.stdout) == (2, "")
    assert "HEAVY []" in done.stderr
    assert "--static and --contracts exclude each other; give one" in done.stderr


def test_schema_is_printed_or_written(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(out))
    assert run(capsys, "schema", "--out", "s.json")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(out)
    assert json.loads(run(capsys, "schema", "--out", "s.json", "--json")[1]) == {"out": "s.json"}
    code, _, err = run(capsys, "schema", "--out", "no/such/folder/s.json")
    assert code == ExitCode.RESOURCES
    assert err.startswith("error: no/such/folder/s.json: the schema cannot be written")


def test_parts_lists_families_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    _, everything, _ = run(capsys, "parts")
    assert re.search(r"^token_mixer\n  attention +Softmax attention", everything, re.MULTILINE)
    _, one, _ = run(capsys, "parts", "attention")
    assert "  num_heads: whole number; >= 1; required\n      query heads (N)\n" in one
    _, data, _ = run(capsys, "parts", "norm", "--json")
    variants = json.loads(data)["variants"]
    assert {v["family"] for v in variants} == {"norm"}
    rms = next(v for v in variants if v["type"] == "rms_norm")
    eps = next(f for f in rms["fields"] if f["name"] == "eps")
    assert eps == {
        "name": "eps",
        "type": "number",
        "required": False,
        "default": 1e-6,
        "range": "> 0.0",
        "only_if": None,
        "doc": "added to the mean square",
    }
    code, _, err = run(capsys, "parts", "atention")
    assert (code, err) == (2, "error: 'atention' is no family and no type; did you mean 'attention'?\n")


def test_diff_names_what_differs(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("base: small.yaml\nmodel: {norm: {eps: 1e-5}}\n")
    _, out, _ = run(capsys, "diff", config, "other.yaml")
    assert out.startswith("model.norm.eps: 1e-06 -> 1e-05\n")
    assert out.endswith(": different runs\n")
    report = json.loads(run(capsys, "diff", config, "other.yaml", "--json")[1])
    assert report["differences"] == [{"path": "model.norm.eps", "a": 1e-6, "b": 1e-5}]
    assert report["same_run"] is False
    (tmp_path / "same.yaml").write_text("base: small.yaml\nruntime: {device: cpu}\n")
    report = json.loads(run(capsys, "diff", config, "same.yaml", "--json")[1])
    assert report["same_run"] is True
    assert report["a"] == report["b"]
    assert load_experiment(config).runtime.device == "auto"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``verb(code)`` adds a file with one verb ``probe`` whose function body is ``code``."""

    def add(body: str) -> None:
        text = "import typer\nfrom graft.errors import *\napp = typer.Typer(add_completion=False)\n@app.command()\n"
        (tmp_path / "probe.py").write_text(f'{text}def probe() -> None:\n    """A probe."""\n    {body}\n')
        (tmp_path / "_helper.py").write_text("raise RuntimeError('helpers are not verbs')\n")
        monkeypatch.setattr(graft.cli, "__path__", [*graft.cli.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, "graft.cli.probe", raising=False)

    yield add
    sys.modules.pop("graft.cli.probe", None)


def test_a_verb_is_one_file(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb("typer.echo('here')")
    assert "probe" in main.verbs()
    assert "_helper" not in main.verbs()
    assert run(capsys, "probe") == (0, "here\n", "")
    assert "probe" in run(capsys, "--help")[1]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise DataError('no rows', where='x.jsonl:3', fix='add some')", 3, "error: x.jsonl:3: no rows; add some\n"),
        ("raise CheckpointError('gone')", 4, "error: gone\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise typer.Exit(75)", 75, ""),
        ("raise typer.Abort", 130, "error: interrupted\n"),
    ],
)
def test_every_error_is_one_line_and_its_exit_code(
    verb: Any, capsys: pytest.CaptureFixture[str], body: str, code: int, message: str
) -> None:
    verb(body)
    got, out, err = run(capsys, "probe")
    assert (got, out, err.lstrip()) == (code, "", message)


def test_an_unexpected_error_keeps_its_traceback_in_a_file(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb("raise ZeroDivisionError('oops')")
    code, _, err = run(capsys, "probe")
    assert code == ExitCode.INTERNAL
    assert err.startswith("error: ZeroDivisionError: oops (a bug in graft; the traceback is in ")
    assert err.count("\n") == 1
    path = Path(err.split("the traceback is in ")[1].rstrip(")\n"))
    assert "ZeroDivisionError: oops" in path.read_text()
    path.unlink()


@pytest.mark.parametrize("error", [ZeroDivisionError, DataError])
def test_graft_debug_shows_the_traceback(
    verb: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(f"raise {error.__name__}('oops')")
    monkeypatch.setenv("GRAFT_DEBUG", "1")
    with pytest.raises(error):
        main.run(["probe"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chekc"], "error: no verb 'chekc'; did you mean 'check'?; see 'graft --help'"),
        (["zzz"], "error: no verb 'zzz'; verbs: "),
        (["check"], "error: Missing argument '"),
        (["check", "--statik"], "error: No such option: --statik"),
    ],
)
def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message), err
    assert err.count("\n") == 1


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[1] == run(capsys, "--help")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert run(capsys, "--version")[1] == f"graft {version('graft')}\n"


@pytest.mark.parametrize("name", main.verbs())
def test_every_verb_follows_the_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    module = importlib.import_module(f"graft.cli.{name}")
    assert isinstance(module.app, typer.Typer)
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "--install-completion" not in out


def test_a_reader_that_goes_away_is_no_error(config: str) -> None:
    command = f"{sys.executable} -c 'from graft.cli.main import main; main()' schema | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_is_plain_without_a_terminal_and_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main.plain_output() is False
    monkeypatch.setenv("NO_COLOR", "1")
    assert main.plain_output() is True
    assert "\x1b" not in process("parts", "norm", FORCE_COLOR="").stdout
