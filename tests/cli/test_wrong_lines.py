"""Command lines as people mistype them, and outputs that go away: a word and a code for each, no traceback, no loss."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft import api
from graft.cli.main import run as command
from graft.config.identity import resolved_yaml
from tiny_run import tiny

GRAFT = "import sys; from graft.cli.main import main; main()"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a trained run, and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("lines")
    experiment = tiny(folder, "training.max_steps=2", "evaluation.interval=null")
    api.train(experiment, out=folder / "run", stream=io.StringIO())
    (folder / "c.yaml").write_text(resolved_yaml(experiment))
    (folder / "empty.txt").write_text("")
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    (folder / "folder").mkdir()
    return folder


WRONG = [
    ("generate nowhere", 4, "there is nothing here"),
    ("generate c.yaml", 4, "neither a run directory nor a checkpoint"),
    ("generate folder", 4, "neither a run directory nor a checkpoint"),
    ("generate run --temperature -1", 2, "temperature is -1.0; expected 0 (greedy) or more"),
    ("generate run --temperature 0 --top-k 5", 2, "do nothing at temperature 0"),
    ("generate run --top-k 0", 2, "top_k is 0; expected 1 or more"),
    ("generate run --max-new-tokens -3", 2, "greater than or equal to 1"),
    ("generate run --max-new-tokens 1000000000000", 6, "out of memory when 8000000000000 bytes more were asked for"),
    ("generate run --stop=", 2, "an empty stop string"),
    ("generate run --prompt \udcff", 3, "lone surrogate"),
    ("generate run --device banana", 2, "--device: 'banana' is no device"),
    ("generate run --dtype fp64", 2, "'fp64' is no dtype"),
    ("chat run --max-new-tokens 50", 2, "leave no room in a context of 32"),
    ("eval run", 2, "give either --text or --validation"),
    ("eval run --text empty.txt", 3, "there is no text to score"),
    ("eval run --text bad.txt", 3, "bad.txt: byte 0 is no UTF-8"),
    ("eval run --text folder", 3, "Is a directory"),
    ("eval run --text c.yaml --context 0", 2, "greater than or equal to 1"),
    ("eval run --text c.yaml --stride 0", 2, "greater than or equal to 1"),
    ("eval run --text c.yaml --stride 99", 2, "expected a stride of 1 to 32"),
    ("quantize run --out run", 4, "it already holds something"),
    ("quantize run --out new", 2, "no ternary layer to pack"),
    ("report folder", 4, "it holds no run"),
    ("tokenizer train --files text.txt --vocab-size 300 --out c.yaml", 6, "c.yaml: File exists"),
    ("tokenizer train --files text.txt --vocab-size 300 --cache-dir c.yaml", 6, "set --cache-dir to a folder"),
    ("tokenizer train --files text.txt --vocab-size 3", 2, "greater than or equal to 257"),
    ("data build c.yaml runtime.cache_dir=c.yaml", 6, "set runtime.cache_dir to a folder that can be written"),
    ("data build c.yaml data.source.path=folder", 3, "no file matches"),
    ("data biuld c.yaml", 2, "Did you mean 'build'?"),
    ("train run", 2, "the config is not a file"),
    ("train c.yaml --resume", 2, "requires an argument"),
    ("train c.yaml --out run", 4, "it already holds a run (done at step 2)"),
    ("train c.yaml --out empty.txt", 6, "cannot be written: File exists"),
    ("train c.yaml sed=1", 2, "sed: unknown key; did you mean 'seed'?"),
    ("check text.txt", 2, "the suffix '.txt' is no config format"),
    ("check c.yaml --static --contracts", 2, "exclude each other"),
    ("diff c.yaml", 2, "Missing argument 'b'"),
    ("parts nosuch", 2, "is no family and no type"),
    ("trian c.yaml", 2, "did you mean 'train'?"),
]


@pytest.mark.parametrize(("line", "code", "words"), WRONG, ids=[ascii(line) for line, _, _ in WRONG])
def test_a_wrong_line_is_answered(
    line: str, code: int, words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    kept = (place / "c.yaml").read_text(), (place / "run" / "status.json").read_text()
    assert command(line.split()) == code
    said = capsys.readouterr().err
    assert words in said
    assert "a bug in graft" not in said
    assert kept == ((place / "c.yaml").read_text(), (place / "run" / "status.json").read_text())


@pytest.mark.parametrize(
    "line",
    [
        "generate run --prompt= --max-new-tokens 2",
        "generate run --temperature 0 --max-new-tokens 2",
        "generate run --top-k 100000 --max-new-tokens 2",
        f"generate run --prompt {'a' * 50} --max-new-tokens 2",
    ],
)
def test_an_unusual_line_is_carried_out(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert command(line.split()) == 0


def test_a_damaged_status_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.resolved.yaml").write_text((place / "c.yaml").read_text())
    for damaged in ('{"sta', "[]"):
        (tmp_path / "status.json").write_text(damaged)
        assert command(["report", str(tmp_path)]) == 4
        assert "status.json: no JSON can be read" in capsys.readouterr().err


def started(place: Path, *arguments: str, stdout: int) -> subprocess.Popen[str]:
    """The command in a process of its own, to which Ctrl-C means what it means at a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", GRAFT, *arguments],
        cwd=place,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_training_goes_on_when_nobody_reads_any_more(place: Path, tmp_path: Path) -> None:
    process = started(place, "train", "c.yaml", "--out", str(tmp_path / "run"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert "step 2/2" in (tmp_path / "run" / "train.log").read_text()


def test_an_output_that_cannot_be_written_is_no_bug(place: Path) -> None:
    with open("/dev/full", "w") as full:
        process = started(place, "schema", stdout=full.fileno())
        _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (
        6,
        "error: No space left on device; free space, change permissions, or name another place\n",
    )


@pytest.mark.slow
def test_an_interrupt_ends_generation_and_preparation_with_a_word(place: Path) -> None:
    (place / "big.txt").write_text("".join(f"line {i} the cat sees a dog\n\n" for i in range(400_000)))
    build = ("data", "build", "c.yaml", "data.source.path=big.txt", "--json")
    whole = started(place, *build, "runtime.cache_dir=whole", stdout=subprocess.PIPE)
    expected = json.loads(whole.communicate(timeout=300)[0])["fingerprint"]
    for arguments in (("generate", "run", "--max-new-tokens", "1000000"), (*build, "runtime.cache_dir=pieces")):
        process = started(place, *arguments, stdout=subprocess.PIPE)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130
        assert errors.endswith("error: interrupted\n")
        assert "Traceback" not in errors
    again = started(place, *build, "runtime.cache_dir=pieces", stdout=subprocess.PIPE)
    assert json.loads(again.communicate(timeout=300)[0])["fingerprint"] == expected
