"""Reading YAML, JSON and TOML with places."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.config.documents import READERS, read_document
from graft.config.report import ConfigProblems
from graft.config.tree import Path as KeyPath
from graft.config.tree import Place, walk


def places(document: Any) -> dict[KeyPath, tuple[int | None, int | None]]:
    return {path: (n.key_position().line, n.key_position().col) for path, n in walk(document.root) if path}


def test_yaml_1_2_scalars_mean_what_the_standard_says() -> None:
    text = """
a: 1e-4
b: yes
c: 0o17
d: 017
e: ~
f: .5
g: 2024-01-01
h: "1"
i: TRUE
j: 1_000
k: -.inf
l: +12e03
"""
    data = READERS[".yaml"](text, "f").root.plain()
    assert data == {
        "a": 1e-4,
        "b": "yes",
        "c": 15,
        "d": 17,
        "e": None,
        "f": 0.5,
        "g": "2024-01-01",
        "h": "1",
        "i": True,
        "j": 1000,
        "k": -math.inf,
        "l": 12000.0,
    }
    assert type(data["d"]) is int
    assert data["i"] is True


def test_the_three_formats_agree_on_data_and_lines() -> None:
    yaml = "model:\n  size: 3\n  parts:\n    - {n: 1}\n    - {n: 2}\nseed: 7\n"
    toml = "seed = 7\n[model]\nsize = 3\n[[model.parts]]\nn = 1\n[[model.parts]]\nn = 2\n"
    js = '{\n "model": {"size": 3,\n\t"parts": [{"n": 1},\n   {"n": 2}]},\n "seed": 7\n}'
    documents = {
        suffix: READERS[suffix](text, "f") for suffix, text in ((".yaml", yaml), (".toml", toml), (".json", js))
    }
    assert len({json.dumps(d.root.plain(), sort_keys=True) for d in documents.values()}) == 1
    assert places(documents[".yaml"])[("model", "parts", 1, "n")] == (5, 8)
    assert places(documents[".json"])[("model", "parts", 1, "n")] == (4, 5)
    assert places(documents[".json"])[("model", "parts")] == (3, 2)
    assert places(documents[".toml"])[("model", "parts", 1, "n")] == (7, 1)
    assert places(documents[".toml"])[("model", "size")] == (3, 1)


def test_values_have_places_of_their_own() -> None:
    node, rest = READERS[".yaml"]("a:\n  b:   17\n", "f.yaml").root.find(("a", "b"))
    assert rest == ()
    assert node.place == Place("f.yaml", 2, 8)
    assert node.key_place == Place("f.yaml", 2, 3)


def test_toml_keys_inside_multi_line_text_are_no_keys() -> None:
    document = READERS[".toml"]('a = """\nb = 1\n"""\nb = 2\n"c.d" = 3\ne.f = 4\n', "f")
    assert places(document)[("b",)] == (4, 1)
    assert places(document)[("c.d",)] == (5, 1)
    assert places(document)[("e", "f")] == (6, 1)


def test_merge_keys_give_way_to_written_ones() -> None:
    data = READERS[".yaml"]("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {b: 4, <<: [*x, {c: 5}]}\n", "f").root.plain()
    assert data["y"] == {"a": 1, "b": 3}
    assert data["z"] == {"a": 1, "b": 4, "c": 5}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_duplicate_keys_are_reported_with_both_lines(suffix: str) -> None:
    text = {".yaml": "a: 1\nb:\n  c: 1\n  c: 2\n", ".json": '{"a": 1,\n"b": {\n"c": 1,\n"c": 2}}'}[suffix]
    (problem,) = READERS[suffix](text, "f").problems
    assert problem.path == ("b", "c")
    assert problem.place.line == 4
    assert "first in line 3" in problem.problem


def test_numbers_as_keys_are_text_and_other_keys_are_refused() -> None:
    document = READERS[".yaml"]("0: a\n-1: b\n1.5: c\ntrue: d\n", "f")
    assert document.root.plain() == {"0": "a", "-1": "b"}
    assert [p.place.line for p in document.problems] == [3, 4]


WRONG = {
    "tab.yaml": ("a:\n\tb: 1\n", "tab", 2),
    "two.yaml": ("a: 1\n---\nb: 2\n", "more than one YAML document", 2),
    "list.yaml": ("- 1\n", "top level is a list", 1),
    "scalar.yaml": ("hello\n", "top level is a single value", 1),
    "open.yaml": ("a: [1, 2\n", "not YAML", 2),
    "colon.yaml": ("a: b: c\n", "quotes", 1),
    "alias.yaml": ("a: *b\n", "undefined alias", 1),
    "old.yaml": ("%YAML 1.1\n---\na: yes\n", "only YAML 1.2", 1),
    "control.yaml": ("a: \x01\n", "not YAML", None),
    "empty.yaml": ("  \n", "is empty", 1),
    "comment.yaml": ("# only a comment\n", "top level is a single value", 1),
    "bad.json": ('{"a": 1,}', "not JSON", 1),
    "list.json": ("[]", "top level is a list", 1),
    "bad.toml": ("a = \n", "not TOML", 1),
    "twice.toml": ("a = 1\na = 2\n", "not TOML", 2),
    "config.ini": ("a=1", "no config format", None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_problem_with_its_place(name: str, tmp_path: Path) -> None:
    text, expected, line = WRONG[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigProblems, match=expected) as caught:
        read_document(tmp_path / name, name)
    assert [p.place.line for p in caught.value.problems] == [line]
    assert str(caught.value).startswith(name)


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(ConfigProblems, match="0xe9 is not UTF-8") as caught:
        read_document(path)
    assert (caught.value.problems[0].place.line, caught.value.problems[0].place.col) == (2, 4)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_document(path).root.plain() == {"a": 1}


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: 1")
    with pytest.raises(ConfigProblems, match=r"did you mean '.*train.yaml'"):
        read_document(tmp_path / "trian.yaml")
    with pytest.raises(ConfigProblems, match="is not a file"):
        read_document(tmp_path)


def test_unknown_yaml_tags_and_overlong_numbers_are_problems() -> None:
    document = READERS[".yaml"]("a: !!python/object:os.system x\nb: 99999999999999999999\nc: 1e999\n", "f")
    assert [p.place.line for p in document.problems] == [1, 2, 3]
    assert len(READERS[".json"]('{"b": 99999999999999999999}', "f").problems) == 1
    assert len(READERS[".json"](f'{{"b": {"9" * 5000}}}', "f").problems) == 1
    assert len(READERS[".toml"]("b = 99999999999999999999\nc = 2024-01-01\n", "f").problems) == 2


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4), st.sampled_from([None, 1, "\t"]))
def test_json_reads_as_the_standard_library_does(data: Any, indent: Any) -> None:
    text = json.dumps(data, indent=indent)
    document = READERS[".json"](text, "f")
    assert document.root.plain() == data
    assert document.problems == []
    lines = text.split("\n")
    for path, node in walk(document.root):
        if path and isinstance(path[-1], str):
            at = node.key_position()
            assert at.line is not None
            assert at.col is not None
            assert lines[at.line - 1][at.col - 1 :].startswith(json.dumps(path[-1]))
