"""``graft data`` and ``graft tokenizer``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.cli.main import run
from graft.data.inspect import BORDER, decoded_row, length_histogram
from graft.data.loader import make_packing
from graft.data.prepare import prepare
from graft.data.tokenizers.base import load_tokenizer
from graft.errors import ExitCode
from tiny_data import data_config, experiment, make_store, words, write_jsonl

TEXTS = [words(5 + i % 20, i) for i in range(60)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    with path.open("a") as file:
        file.write("broken\n")
    made = experiment(data_config(path, max_bad_rows=1, validation={"fraction": 0.2}), tmp_path / "cache")
    (tmp_path / "config.json").write_text(json.dumps(made.to_dict()))
    return tmp_path / "config.json"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == ExitCode.DONE
    return json.loads(capsys.readouterr().out)


def test_build_reports_the_same_as_inspect(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = printed(capsys, "data", "build", str(config))
    assert built["train"]["documents"] + built["validation"]["documents"] == len(TEXTS)
    assert built["train"]["bytes"] + built["validation"]["bytes"] == sum(map(len, TEXTS))
    assert built["skipped"] == {"broken JSON": 1}
    assert built["first_skipped"][0].endswith("a.jsonl:61: broken JSON")
    assert (Path(built["folder"]) / "train" / "manifest.json").is_file()
    found = printed(capsys, "data", "inspect", str(config), "data.packing.type=best_fit", "--samples", "3")
    assert found["fingerprint"] == built["fingerprint"]
    assert len(found["samples"]) == 3
    assert 0.5 < found["train"]["packing_efficiency"] <= 1
    assert sum(part["documents"] for part in found["train"]["lengths"]) == built["train"]["documents"]
    assert all(Path(shard["file"]).is_file() for shard in found["validation"]["shards"])


def test_the_text_for_people_holds_the_same_numbers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "data", "inspect", str(config))
    assert run(["data", "inspect", str(config)]) == ExitCode.DONE
    text = capsys.readouterr().out
    for value in (found["fingerprint"], found["train"]["shards"][0]["hash"], "1 x broken JSON", found["samples"][0]):
        assert value in text
    assert run(["data", "build", str(config)]) == ExitCode.DONE
    assert f"{found['train']['tokens']:,}" in capsys.readouterr().out


def test_inspect_reads_every_shard(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = printed(capsys, "data", "build", str(config))
    shard = Path(built["folder"]) / "train" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    assert run(["data", "inspect", str(config)]) == ExitCode.DATA
    assert "content changed" in capsys.readouterr().err


def test_borders_are_visible_and_padding_is_not(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defg", "hijk", "lmno"] * 4)
    for packing, count in ({"type": "concat"}, 16), ({"type": "best_fit"}, 12):
        made = experiment(data_config(path, packing=packing, seq_len=16), tmp_path / "cache")
        prepared = prepare(made)
        rows = make_packing(made, prepared.train, seed=0)
        row = decoded_row(rows, prepared.tokenizer, 0)
        assert len(row.replace(BORDER, "")) + row.count(BORDER) >= count
        assert BORDER in row
        if packing["type"] == "best_fit":
            assert all(word in {"abc", "defg", "hijk", "lmno"} for word in row.split(BORDER)[1:])


def test_the_length_histogram_is_the_lengths(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [[1] * n for n in (0, 1, 1, 2, 3, 4, 6, 7, 8, 30)])
    assert [tuple(part.values()) for part in length_histogram(store)] == [
        (1, 1, 1),
        (2, 2, 2),
        (3, 4, 2),
        (5, 8, 3),
        (9, 16, 1),
        (17, 32, 1),
    ]
    assert np.sum([part["documents"] for part in length_histogram(store)]) == store.num_documents


def test_train_a_tokenizer_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[i::2]) for i, name in enumerate("ab")]
    out = tmp_path / "tokenizer"
    options = ["--vocab-size", "300", "--out", str(out), "--cache-dir", str(tmp_path / "cache")]
    report = printed(capsys, "tokenizer", "train", "--files", *map(str, paths), *options)
    assert report["train"]["documents"] + report["validation"]["documents"] == len(TEXTS)
    tokenizer = load_tokenizer(out)
    assert (tokenizer.vocab_size, tokenizer.fingerprint()) == (300, report["fingerprint"])
    assert report["validation"]["bytes_per_token"] > 1.3
    assert run(["tokenizer", "train", "--files", *map(str, paths), *options]) == ExitCode.DONE
    assert f"{report['validation']['bytes_per_token']:.3f} bytes/token" in capsys.readouterr().out


def test_train_the_tokenizer_of_a_config_and_use_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = ["data.tokenizer={type: bpe, vocab_size: 280}", "--vocab-size", "290", "--out", str(tmp_path / "out")]
    report = printed(capsys, "tokenizer", "train", str(config), *trained)
    assert report["vocab_size"] == 290
    used = printed(capsys, "data", "build", str(config), f"data.tokenizer={{type: file, path: {tmp_path / 'out'}}}")
    assert used["vocab_size"] == 290
    assert used["train"]["tokens"] == report["train"]["tokens"]


def test_wrong_uses_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "train"]) == ExitCode.CONFIG
    assert "neither a config nor --files" in capsys.readouterr().err
    assert run(["tokenizer", "train", "--files", str(tmp_path)]) == ExitCode.CONFIG
    assert "--files needs --vocab-size" in capsys.readouterr().err
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"] * 9)
    wrong = ["--files", str(path), "--vocab-size", "5000", "--cache-dir", str(tmp_path / "cache")]
    assert run(["tokenizer", "train", *wrong]) == ExitCode.DATA
    assert "repeated pairs for" in capsys.readouterr().err


def test_without_a_config_messages_name_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, texts, csv = tmp_path / "a.parquet", tmp_path / "a.jsonl", tmp_path / "a.csv"
    pq.write_table(pa.table({"body": TEXTS}), table)
    texts.write_text("broken\n" + write_jsonl(tmp_path / "b.jsonl", TEXTS).read_text())
    csv.write_text("one,two")
    always = ["--vocab-size", "300", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]

    def said(*arguments: str, code: ExitCode = ExitCode.DATA) -> str:
        assert run(["tokenizer", "train", *always, *arguments]) == code
        message = capsys.readouterr().err
        assert "data." not in message
        return message

    assert "no column 'text'; expected one of body; set --text-field" in said("--files", str(table))
    assert "--max-bad-rows" in said("--files", str(texts))
    assert "set --format to text, jsonl or parquet" in said("--files", str(csv))
    assert "correct --files" in said("--files", str(tmp_path / "gone.txt"))
    assert "--vocab-size: the training text" in said("--files", str(tmp_path / "b.jsonl"), "--vocab-size", "5000")
    assert "--text-field" in said("--files", str(csv), "--format", "text", "--text-field", "x", code=ExitCode.CONFIG)
    wrong = said("--files", str(table), "--validation-fraction", "1.5", code=ExitCode.CONFIG)
    assert "--validation-fraction: 1.5 is no share" in wrong
    few = ["--text-field", "body", "--validation-fraction", "0.001"]
    assert run(["tokenizer", "train", "--files", str(table), *few, *always]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "warning: --validation-fraction: 0.001 of the text was to be held out" in out
    assert "data.validation.fraction" not in out
    assert run(["tokenizer", "train", "--files", str(texts), "--max-bad-rows", "1", *always]) == ExitCode.DONE


def test_options_for_files_do_not_go_with_a_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "train", str(config), "--text-field", "body"]) == ExitCode.CONFIG
    assert "give data.source.text_field=body instead" in capsys.readouterr().err


def test_a_held_out_share_that_is_far_off_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "data", "build", str(config))["warnings"] == []
    coarse = [str(config), "data.validation.fraction=0.001"]
    (warning,) = printed(capsys, "data", "build", *coarse)["warnings"]
    assert warning.startswith("data.validation.fraction: 0.001 of the text was to be held out, and 0.0")
    assert "(1 of 60 documents)" in warning
    assert run(["data", "inspect", *coarse]) == ExitCode.DONE
    assert capsys.readouterr().out.count(f"warning: {warning}") == 1
