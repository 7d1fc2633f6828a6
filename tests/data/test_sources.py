"""Files of every kind as documents, and what is done with rows that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from graft.config.registry import variants
from graft.data.sources.base import BadRows, Document
from graft.data.sources.files import FilesSource
from graft.data.sources.files_config import FilesSourceConfig
from graft.errors import DataError, ResourceError


def source(path: Any, cache: Path, **settings: Any) -> FilesSource:
    return FilesSourceConfig.model_validate({"path": path, **settings}).build(cache)


def texts(path: Any, cache: Path, **settings: Any) -> list[str]:
    return [d.text for d in source(path, cache, **settings).documents(BadRows(0))]


def test_a_text_file_as_file_paragraphs_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n  \r\nthree\n\n\n")
    assert texts(str(path), tmp_path) == ["one\ntwo\n\n  \nthree\n\n\n"]
    assert texts(str(path), tmp_path, document="paragraph") == ["one\ntwo", "three"]
    assert texts(str(path), tmp_path, document="line") == ["one", "two", "three"]
    found = list(source(str(path), tmp_path, document="paragraph").documents(BadRows(0)))
    assert found[1] == Document("three", "a.txt:5", f"{path}:5")


def test_every_format_plain_and_compressed_gives_the_same_rows(tmp_path: Path) -> None:
    rows = ["first", "zweite Zeile\nmit é", "third 中文"]
    jsonl = "".join(json.dumps({"body": row, "id": i}) + "\n" for i, row in enumerate(rows)).encode()
    pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "body": rows}), tmp_path / "rows.parquet")
    parquet = (tmp_path / "rows.parquet").read_bytes()
    for name, content in {"rows.jsonl": jsonl, "rows.json": jsonl, "rows.parquet": parquet}.items():
        for suffix, data in ("", content), (".zst", zstandard.compress(content)):
            path = tmp_path / (name + suffix)
            path.write_bytes(data)
            assert texts(str(path), tmp_path, text_field="body") == rows, path.name


def test_folders_globs_and_lists_are_sorted_and_read_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/.hidden.txt", "skipped.csv", ".git/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert texts(str(root), tmp_path) == ["a.md", "b.txt", "sub/c.txt"]
    assert texts(str(root / "**" / "*.txt"), tmp_path) == ["b.txt", "sub/c.txt"]
    assert texts([str(root / "b.txt"), str(root)], tmp_path) == ["a.md", "b.txt", "sub/c.txt"]
    assert len(texts(str(root), tmp_path, format="text")) == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.txt").write_text("the other b")
    assert texts([str(root / "b.txt"), str(other / "b.txt")], tmp_path) == ["b.txt", "the other b"]


def test_nothing_found_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    for path, message in {
        tmp_path / "nowhere.txt": "no such file",
        tmp_path / "*.txt": "no file matches",
        tmp_path: "none of the 1 files is of a known format",
    }.items():
        with pytest.raises(DataError, match=message):
            texts(str(path), tmp_path / "cache")
    with pytest.raises(DataError, match=r"'\.csv' says nothing about the format"):
        texts(str(tmp_path / "x.csv"), tmp_path / "cache")
    with pytest.raises(DataError, match="no file is named"):
        texts([], tmp_path / "cache")


def test_documents_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    documents = source(str(path), tmp_path).documents(BadRows(0))
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match=r"a\.jsonl:2: unusable row: broken JSON"):
        next(documents)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'; expected one of id, body"):
        texts(str(tmp_path / "a.parquet"), tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="no readable Parquet"):
        texts(str(tmp_path / "a.parquet"), tmp_path)


def test_parquet_rows_without_text_are_bad_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None, "", "y"]}), tmp_path / "a.parquet")
    bad = BadRows(2)
    assert [d.text for d in source(str(tmp_path / "a.parquet"), tmp_path).documents(bad)] == ["x", "y"]
    assert bad.causes == {"field 'text' is no string": 1, "empty text": 1}


def test_broken_compression_is_a_data_error(tmp_path: Path) -> None:
    whole = zstandard.compress(b'{"text": "something long enough"}\n' * 1000)
    for content in (gzip.compress(b"x"), whole[: len(whole) // 2]):
        (tmp_path / "a.jsonl.zst").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst"):
            texts(str(tmp_path / "a.jsonl.zst"), tmp_path)


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_names_the_extra(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ResourceError, match=rf"{package}.*graft\[data\]"):
        texts(str(tmp_path / name), tmp_path)


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same text")
        os.utime(tmp_path / folder / "a.txt", (10**9, 10**9))
    cache = tmp_path / "cache"
    first = source(str(tmp_path / "one"), cache).fingerprint()
    assert source(str(tmp_path / "two"), cache).fingerprint() == first
    assert source(str(tmp_path / "one"), cache).fingerprint() == first  # from the cache
    assert source(str(tmp_path / "one"), cache, document="line").fingerprint() != first
    (tmp_path / "one" / "a.txt").write_text("Same text")
    assert source(str(tmp_path / "one"), cache).fingerprint() != first


def test_every_source_variant_says_how_much_it_holds_out() -> None:
    for config in variants("source").values():
        assert config.__doc__
    assert 0 < FilesSource.default_validation_fraction < 0.5
