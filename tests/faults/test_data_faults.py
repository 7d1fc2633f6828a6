"""Fault matrix, rows 33-37: what broken data does, and what a killed preparation leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from graft.data.loader import TrainLoader
from graft.data.prepare import prepare, prepare_data
from graft.data.sources import readers
from graft.data.store import DOCUMENTS_FILE, MANIFEST, TokenStore
from graft.errors import DataError, ExitCode
from tiny_data import data_config, experiment, words, write_jsonl

pytestmark = pytest.mark.fault

GOOD = [json.dumps({"text": words(12, i)}).encode() for i in range(20)]
BAD: dict[str, bytes] = {
    "broken JSON": b'{"text": "cut o',
    "row is no object": b'["text"]',
    "no field 'text'": b'{"body": "x"}',
    "field 'text' is no string": b'{"text": 5}',
    "empty text": b'{"text": "  "}',
    "NUL character": b'{"text": "a\\u0000b"}',
    "lone surrogate": b'{"text": "a\\ud800b"}',
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "line of 50 MB or more": b"",  # written where it is used
}


# 33: unusable JSONL rows


@pytest.mark.parametrize("cause", [c for c in BAD if "MB" not in c])
def test_33_a_bad_row_is_counted_or_named(cause: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*GOOD[:3], b"", BAD[cause], *GOOD[3:]]) + b"\n")
    with pytest.raises(DataError) as caught:
        prepare_data(data_config(path), tmp_path / "cache")
    assert caught.value.exit_code == ExitCode.DATA
    assert str(caught.value).startswith(f"{path}:5: unusable row: {cause}")
    prepared = prepare_data(data_config(path, max_bad_rows=1), tmp_path / "cache")
    assert prepared.report["skipped"] == {cause: 1}
    assert prepared.train.num_documents + prepared.validation.num_documents == len(GOOD)
    with pytest.raises(DataError, match="1 unusable rows"):  # the cache does not make the row good
        prepare_data(data_config(path, max_bad_rows=0), tmp_path / "cache")


def test_33_a_line_of_50_mb_is_skipped_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = b'{"text": "' + b"x" * readers.MAX_LINE_BYTES + b'"}'
    path.write_bytes(b"\n".join([GOOD[0], line, *GOOD[1:]]) + b"\n")
    prepared = prepare_data(data_config(path, max_bad_rows=1), tmp_path / "cache")
    assert prepared.report["skipped"] == {"line of 50 MB or more": 1}
    assert prepared.train.num_documents + prepared.validation.num_documents == len(GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl:2: unusable row: line of 50 MB or more"):
        prepare_data(data_config(path), tmp_path / "other")


def test_33_causes_are_counted_apart_until_there_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [row for row in BAD.values() if row]
    path.write_bytes(b"\n".join([*GOOD, *bad, bad[0]]) + b"\n")
    prepared = prepare_data(data_config(path, max_bad_rows=9), tmp_path / "cache")
    assert sum(prepared.report["skipped"].values()) == 9
    assert prepared.report["skipped"]["broken JSON"] == 2
    assert len(prepared.report["skipped"]) == 8
    with pytest.raises(DataError, match=r"a\.jsonl:29: unusable row: broken JSON .so far: 1 NUL character, "):
        prepare_data(data_config(path, max_bad_rows=8), tmp_path / "cold")


# 34: nothing to train on


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n{"text": 3}\n'])
def test_34_no_document_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no document") as caught:
        prepare_data(data_config(path, max_bad_rows=100), tmp_path / "cache")
    assert ("all of its 2 rows are unusable" in str(caught.value)) == (b"text" in content)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="empty text"):
        prepare_data(data_config(tmp_path / "empty.txt"), tmp_path / "cache")


@pytest.mark.parametrize(("fraction", "side"), [(0.5, "train"), (0.05, "validation")])
def test_34_less_than_one_row_is_an_error_before_training(fraction: float, side: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    data = data_config(tmp_path / "a.txt", seq_len=51, validation={"fraction": fraction})
    with pytest.raises(DataError, match=rf"the {side} documents have \d+ tokens, less than one row"):
        prepare(experiment(data, tmp_path / "cache"))
    enough = data_config(tmp_path / "a.txt", seq_len=50, validation={"fraction": 0.5})
    loader = TrainLoader(prepare(experiment(enough, tmp_path / "cache")), experiment(enough, tmp_path / "cache"))
    assert loader.next_step()[0].num_targets == 2 * 51  # four rows are two epochs


# 35: damaged shards


def stored(tmp_path: Path) -> Path:
    data = data_config(write_jsonl(tmp_path / "a.jsonl", [words(30, i) for i in range(20)]))
    return prepare_data(data, tmp_path / "cache").train.folder


@pytest.mark.parametrize("name", ["shard-00000.bin", DOCUMENTS_FILE])
def test_35_a_truncated_file_is_named_with_its_end(name: str, tmp_path: Path) -> None:
    folder = stored(tmp_path)
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 3)
    with pytest.raises(DataError, match=rf"{name}: the file is truncated: it ends at byte {size - 3} .*{size}"):
        prepare_data(data_config(tmp_path / "a.jsonl"), tmp_path / "cache")
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: the file is missing"):
        TokenStore.open(folder)


def test_35_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    tokens = np.memmap(folder / "shard-00000.bin", dtype="<u2", mode="r+")
    tokens[41] = 257
    tokens.flush()
    with pytest.raises(DataError, match=r"shard-00000\.bin: token id 257 at byte 82 \(token 41\) is outside the voc"):
        TokenStore.open(folder)


def test_35_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    for name in ("shard-00000.bin", DOCUMENTS_FILE):
        content = bytearray((folder / name).read_bytes())
        content[16] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: .*(changed|outside)"):
            TokenStore.open(folder)
        content[16] ^= 1
        (folder / name).write_bytes(content)
    TokenStore.open(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_35_a_broken_manifest_is_an_error_of_the_data(content: str, tmp_path: Path) -> None:
    folder = stored(tmp_path)
    (folder / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="delete the folder it lies in"):
        TokenStore.open(folder)


# 36: preparation killed at every stage

SCRIPT = """
import sys
from pathlib import Path
from graft.config.experiment import DataConfig
from graft.data import build, store_writer
from graft.data.prepare import prepare_data
build.CHUNK_CHARACTERS, store_writer.SHARD_TOKENS = 700, 500
data = DataConfig.model_validate_json(Path(sys.argv[1]).read_text(), strict=False)
prepare_data(data, Path(sys.argv[2]))
"""

STAGES = [
    "data.tokenizer:*:kill",
    "data.append:1:kill",
    "data.append:3:kill",
    "data.chunk:1:kill",
    "data.chunk:4:kill",
    "data.manifest:*:kill",
    "data.report:*:kill",
    "data.rename:*:kill",
]


def build_in_a_process(tmp_path: Path, cache: Path, fault: str | None) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "GRAFT_FAULT"}
    if fault:
        environment["GRAFT_FAULT"] = fault
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data.json"), str(cache)]
    return subprocess.run(command, env=environment, timeout=60, check=False).returncode


def contents(folder: Path) -> dict[str, bytes]:
    skipped = (".lock", "verified.json", "file_hashes.json")
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(skipped))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    path = write_jsonl(folder / "a.jsonl", [words(5 + i % 40, i) for i in range(60)])
    data = data_config(path, tokenizer={"type": "bpe", "vocab_size": 300}, validation={"fraction": 0.2})
    (folder / "data.json").write_text(json.dumps(data.to_dict()))
    assert build_in_a_process(folder, folder / "cache", None) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", STAGES)
def test_36_a_killed_preparation_ends_in_the_same_bytes(fault: str, uninterrupted: Path, tmp_path: Path) -> None:
    assert build_in_a_process(uninterrupted, tmp_path / "cache", fault) == -signal.SIGKILL
    assert build_in_a_process(uninterrupted, tmp_path / "cache", None) == 0
    assert contents(tmp_path / "cache") == contents(uninterrupted / "cache")


def test_36_killed_again_and_again_it_still_gets_there(uninterrupted: Path, tmp_path: Path) -> None:
    chunks = 0
    for fault in ("data.chunk:2:kill", "data.append:4:kill", "data.report:*:kill"):
        assert build_in_a_process(uninterrupted, tmp_path / "cache", fault) == -signal.SIGKILL
        (journal,) = tmp_path.rglob("journal.json")
        done = json.loads(journal.read_text())["chunks"]
        assert done > chunks  # what was done is not done again
        chunks = done
    assert build_in_a_process(uninterrupted, tmp_path / "cache", None) == 0
    assert contents(tmp_path / "cache") == contents(uninterrupted / "cache")


# 37: a dead worker


def take_steps(loader: TrainLoader, count: int) -> None:
    for _ in range(count):
        loader.next_step()


@pytest.mark.parametrize("kind", ["kill", "exit"])
def test_37_a_worker_that_dies_is_an_error_within_seconds(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_config(write_jsonl(tmp_path / "a.jsonl", [words(30, i) for i in range(20)]))
    made = experiment(data, tmp_path / "cache", workers=1)
    monkeypatch.setenv("GRAFT_FAULT", f"data.worker:3:{kind}")
    loader = TrainLoader(prepare(made), made)
    start = time.monotonic()
    with pytest.raises(DataError, match="a process that prepares batches died") as caught:
        take_steps(loader, 20)
    assert time.monotonic() - start < 10
    assert caught.value.exit_code == ExitCode.DATA
    monkeypatch.delenv("GRAFT_FAULT")
    assert loader.state_dict()["index"] > 0
    loader.next_step()  # the loader starts new workers and goes on where it was
    loader.close()
