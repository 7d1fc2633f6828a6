"""Which documents are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.split import SplitSource
from graft.errors import DataError
from tiny_data import data_config, words, write_jsonl


def sides(path: Path, cache: Path, **changes: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for side, document in SplitSource(data_config(path, **changes), cache).documents(0)[1]:
        found[side].append(document.text)
    return found


def test_one_document_is_cut_as_nanogpt_does(tmp_path: Path) -> None:
    text = words(500, 0)
    (tmp_path / "a.txt").write_text(text)
    found = sides(tmp_path / "a.txt", tmp_path, validation={"fraction": 0.1})
    assert found == {"train": [text[: int(len(text) * 0.9)]], "validation": [text[int(len(text) * 0.9) :]]}


def test_the_held_out_share_is_the_fraction(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(2000)]
    found = sides(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path, validation={"fraction": 0.2})
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert 0.17 < len(found["validation"]) / 2000 < 0.23


def test_more_documents_move_none_to_the_other_side(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(300)]
    small = sides(write_jsonl(tmp_path / "a.jsonl", texts[:200]), tmp_path)
    large = sides(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path)
    assert set(small["validation"]) <= set(large["validation"])
    assert set(small["train"]) <= set(large["train"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(count=st.integers(2, 12), fraction=st.floats(0.001, 0.999))
def test_both_sides_have_a_document(tmp_path: Path, count: int, fraction: float) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"d{i}" for i in range(count)])
    found = sides(path, tmp_path, validation={"fraction": fraction})
    assert found["train"]
    assert found["validation"]
    assert len(found["train"]) + len(found["validation"]) == count


def test_a_separate_source_is_held_out_whole(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
    other = write_jsonl(tmp_path / "other.jsonl", ["c", "d", "e"])
    validation = {"source": {"type": "files", "path": str(other)}}
    assert sides(train, tmp_path, validation=validation) == {"train": ["a", "b"], "validation": ["c", "d", "e"]}


def test_the_fingerprint_knows_the_fraction_and_the_other_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    other = write_jsonl(tmp_path / "b.jsonl", ["c"])
    settings: list[dict[str, Any]] = [
        {},
        {"fraction": 0.3},
        {"source": {"type": "files", "path": str(path)}},
        {"source": {"type": "files", "path": str(other)}},
    ]
    prints = [SplitSource(data_config(path, validation=v), tmp_path).fingerprint() for v in settings]
    assert len({json.dumps(p) for p in prints}) == 4


@pytest.mark.parametrize(
    ("fraction", "held_out", "trained_on", "said"),
    [
        pytest.param(0.1, (1, 100), (9, 900), None, id="as wanted"),
        pytest.param(0.1, (1, 199), (9, 801), None, id="nearly twice"),
        pytest.param(0.1, (1, 201), (9, 799), "0.2 of it is (1 of 10 documents)", id="more than twice"),
        pytest.param(0.1, (1, 49), (9, 951), "0.049 of it is (1 of 10 documents)", id="less than half"),
        pytest.param(0.05, (1, 500), (1, 500), "0.5 of it is (1 of 2 documents)", id="two documents"),
    ],
)
def test_a_share_that_is_off_by_more_than_two_is_said(
    tmp_path: Path, fraction: float, held_out: tuple[int, int], trained_on: tuple[int, int], said: str | None
) -> None:
    split = SplitSource(data_config(tmp_path / "a.txt", validation={"fraction": fraction}), tmp_path)
    (documents, text), (other_documents, other_text) = held_out, trained_on
    found = split.far_off({"documents": documents, "bytes": text}, {"documents": other_documents, "bytes": other_text})
    assert (found is None) == (said is None)
    if said is not None:
        assert f"data.validation.fraction: {fraction:g} of the text was to be held out, and {said}" in str(found)


def test_a_source_of_its_own_has_no_wanted_share(tmp_path: Path) -> None:
    validation = {"source": {"type": "files", "path": str(tmp_path / "b.txt")}}
    split = SplitSource(data_config(tmp_path / "a.txt", validation=validation), tmp_path)
    assert split.far_off({"documents": 1, "bytes": 999}, {"documents": 1, "bytes": 1}) is None


def test_a_text_too_short_to_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="too few to hold out"):
        sides(tmp_path / "a.txt", tmp_path)
