"""Preparation: the same tokens from the same text, kept and found again, by one process or two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.config.experiment import DataConfig
from graft.data import build
from graft.data.prepare import prepare, prepare_data
from graft.data.tokenizers.base import load_tokenizer
from graft.errors import ConfigError, DataError, ResourceError
from tiny_data import data_config, experiment, words, write_jsonl

TEXTS = [words(5 + i % 50, i) for i in range(120)]
TOKENIZERS: dict[str, dict[str, Any]] = {
    "bytes": {"type": "bytes"},
    "characters": {"type": "characters"},
    "bpe": {"type": "bpe", "vocab_size": 300},
}


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "verified.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_document_is_stored_on_its_side(kind: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = data_config(path, tokenizer=TOKENIZERS[kind], validation={"fraction": 0.2})
    prepared = prepare_data(data, tmp_path / "cache")
    found = []
    for store in (prepared.train, prepared.validation):
        documents = [store.document(i) for i in range(store.num_documents)]
        assert all(d[0] == prepared.tokenizer.end_of_document for d in documents)
        found += [prepared.tokenizer.decode(d[1:].tolist()) for d in documents]
        assert store.num_bytes == sum(len(prepared.tokenizer.decode(d.tolist()).encode()) for d in documents)
    assert sorted(found) == sorted(TEXTS)
    report = prepared.report
    assert report["train"]["documents"] + report["validation"]["documents"] == len(TEXTS)
    assert report["train"]["bytes_per_token"] == pytest.approx(1.0) or kind == "bpe"
    assert kind != "bpe" or report["train"]["bytes_per_token"] > 1.5
    assert load_tokenizer(Path(report["folder"]) / "tokenizer").fingerprint() == prepared.tokenizer.fingerprint()


def test_the_second_time_nothing_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = data_config(path, tokenizer=TOKENIZERS["bpe"])
    first = prepare_data(data, tmp_path / "cache")
    monkeypatch.setattr(build, "_tokenise", None)
    monkeypatch.setattr(build.Tokenizer, "train", None)
    again = prepare_data(data, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.report == first.report


def test_two_caches_hold_the_same_bytes_whatever_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = data_config(path, tokenizer=TOKENIZERS["bpe"])
    one = prepare_data(data, tmp_path / "one")
    monkeypatch.setattr(build, "CHUNK_CHARACTERS", 500)
    two = prepare_data(data, tmp_path / "two")
    assert contents(Path(one.report["folder"])) == contents(Path(two.report["folder"]))


def test_the_fingerprint_follows_text_tokenizer_and_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    base = prepare_data(data_config(path), tmp_path / "cache").fingerprint
    moved = write_jsonl(tmp_path / "sub.jsonl", TEXTS).rename(tmp_path / "cache" / "a.jsonl")
    assert prepare_data(data_config(moved), tmp_path / "cache").fingerprint == base
    assert prepare_data(data_config(path, seq_len=8), tmp_path / "cache").fingerprint == base
    write_jsonl(moved, [*TEXTS[:-1], TEXTS[-1] + "."])
    others = [
        data_config(path, tokenizer=TOKENIZERS["bpe"]),
        data_config(path, validation={"fraction": 0.3}),
        data_config(moved),
    ]
    prints = [prepare_data(other, tmp_path / "cache").fingerprint for other in others]
    assert len({base, *prints}) == 4


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ["abc abc abc", "cab"])
    other = write_jsonl(tmp_path / "other.jsonl", ["abc", "abcz"])
    validation = {"source": {"type": "files", "path": str(other)}}
    data = data_config(train, tokenizer=TOKENIZERS["characters"], validation=validation, seq_len=2)
    with pytest.raises(DataError, match=r"other\.jsonl:2: the training text does not hold.*'z'"):
        prepare_data(data, tmp_path / "cache")


def test_a_document_that_spells_the_end_id_is_refused(tmp_path: Path) -> None:
    bpe = prepare_data(
        data_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=TOKENIZERS["bpe"]), tmp_path / "cache"
    ).tokenizer
    spec = json.loads(bpe.raw)  # pyright: ignore[reportAttributeAccessIssue]
    spec["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    path = write_jsonl(tmp_path / "b.jsonl", [*TEXTS, "one <|endoftext|> two"])
    data = data_config(path, tokenizer={"type": "file", "path": str(tmp_path)})
    with pytest.raises(DataError, match=r"b\.jsonl:121: the text gives the end-of-document id"):
        prepare_data(data, tmp_path / "cache")


def test_a_model_smaller_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    made = experiment(data_config(write_jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache")
    small = made.replace(model=made.model.replace(vocab_size=256))
    with pytest.raises(ConfigError, match="vocab_size 256 is less than the tokenizer's 257 ids"):
        prepare(small)
    assert prepare(made.replace(model=made.model.replace(vocab_size=300))).vocab_size == 257


def test_progress_is_told_and_complete(tmp_path: Path) -> None:
    told: list[tuple[str, float, float | None]] = []
    data = data_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=TOKENIZERS["bpe"])
    prepare_data(data, tmp_path / "cache", progress=lambda *news: told.append(news))
    assert {stage for stage, _, _ in told} == {"training the tokenizer", "tokenising"}
    total = sum(map(len, TEXTS))
    assert [news for news in told if news[0] == "tokenising"][-1] == ("tokenising", total, total)


SCRIPT = """
import sys
from pathlib import Path
from graft.config.experiment import DataConfig
from graft.data import build
from graft.data.prepare import prepare_data
build.CHUNK_CHARACTERS = 400
data = DataConfig.model_validate_json(Path(sys.argv[1]).read_text(), strict=False)
print(prepare_data(data, Path(sys.argv[2])).fingerprint)
"""


def test_two_processes_prepare_the_same_data_at_once(tmp_path: Path) -> None:
    data = data_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=TOKENIZERS["bpe"])
    (tmp_path / "data.json").write_text(json.dumps(data.to_dict()))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data.json"), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    expected = prepare_data(data, tmp_path / "alone")
    assert outputs == [expected.fingerprint] * 2
    folder = tmp_path / "cache" / "tokens" / expected.fingerprint
    assert contents(folder) == contents(Path(expected.report["folder"]))


def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_config(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    monkeypatch.setenv("GRAFT_FAULT", "data.append:1:enospc")
    with pytest.raises(ResourceError, match="No space left"):
        prepare_data(data, tmp_path / "cache")
    monkeypatch.delenv("GRAFT_FAULT")
    assert prepare_data(data, tmp_path / "cache").train.num_documents > 0


def test_data_configs_of_the_tests_are_plain(tmp_path: Path) -> None:
    data = data_config(tmp_path / "a.jsonl", tokenizer=TOKENIZERS["bpe"])
    assert DataConfig.model_validate(data.to_dict()) == data
    assert np.isclose(data.validation.fraction or 0.05, 0.05)
