"""The corpus that comes with Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.data.sources import embedded, harvest
from graft.data.sources.base import BadRows
from graft.data.sources.embedded_config import EmbeddedSourceConfig
from graft.data.split import SplitSource
from graft.errors import DataError
from tiny_data import data_config


def test_prose_keeps_sentences_only() -> None:
    text = """Return the   number of items
    in a container as an integer, always.

    >>> len([1, 2, 3]) is what one would type here at the prompt for this

    too few words here

    x = {1: 2, 3: 4}; y = [5, 6, 7, 8]; z = (9, 10, 11); w = 12 + 13 * 14
    """
    assert list(harvest.prose(text)) == ["Return the number of items in a container as an integer, always."]


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """A."""\n    async def f(self):\n        """F."""\n'
    )
    assert sorted(harvest._docstrings(path)) == ["A.", "F.", "Module."]
    path.write_text("not python (")
    assert list(harvest._docstrings(path)) == []


def test_c_modules_give_their_members_docstrings() -> None:
    docs = {name: list(texts) for name, texts in harvest._c_modules()}
    assert any("Return the number of items in a container" in doc for doc in docs["builtins (C)"])
    assert any("Split" in doc or "split" in doc for doc in docs["builtins (C)"])
    assert len(docs) > 20


@pytest.fixture
def small_harvest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A harvest of three modules; counts how often it is done."""
    calls: list[int] = []

    def sections() -> list[tuple[str, list[str]]]:
        calls.append(1)
        return [("topic x", ["a" * 600, "b" * 600]), ("bisect", ["c" * 600]), ("_bisect (C)", ["d" * 600])]

    monkeypatch.setattr(embedded, "harvest", sections)
    return calls


def test_the_harvest_is_cached_checked_and_cut(small_harvest: list[int], tmp_path: Path) -> None:
    source = EmbeddedSourceConfig().build(tmp_path)
    first = [d.text for d in source.documents(BadRows(0))]
    assert first[0] == "a" * 600 + "\n\n" + "b" * 600
    fingerprint = source.fingerprint()
    assert len(small_harvest) == 1
    with source.path.open("ab") as file:  # a torn or edited cache is harvested again
        file.write(b"x")
    assert [d.text for d in EmbeddedSourceConfig().build(tmp_path).documents(BadRows(0))] == first
    assert len(small_harvest) == 2
    short = EmbeddedSourceConfig(max_characters=1300).build(tmp_path)
    assert sum(len(d.text) for d in short.documents(BadRows(0))) == 1300
    assert short.fingerprint() != fingerprint == source.fingerprint()


def test_a_c_module_shares_the_side_of_the_module_it_serves(small_harvest: list[int], tmp_path: Path) -> None:
    documents = list(EmbeddedSourceConfig().build(tmp_path).documents(BadRows(0)))
    assert [d.key for d in documents] == ["topic x", "bisect", "bisect"]


def test_a_python_without_documentation_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "harvest", list)
    with pytest.raises(DataError, match="carries no documentation"):
        EmbeddedSourceConfig().build(tmp_path).fingerprint()


@pytest.mark.slow
def test_size_order_and_split_of_the_whole_corpus(tmp_path: Path) -> None:
    documents = list(EmbeddedSourceConfig().build(tmp_path).documents(BadRows(0)))
    characters = sum(len(d.text) for d in documents)
    assert 1_200_000 < characters < 3_000_000
    places = [d.where for d in documents]
    assert len(set(places)) == len(places) > 300
    assert places.index("topic assert") < places.index("argparse") < places.index("builtins (C)")
    paragraphs = [p for d in documents for p in d.text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    split = SplitSource(data_config("x").replace(source=EmbeddedSourceConfig()), tmp_path)
    sides = list(split.documents(0)[1])
    held_out = {d.key for side, d in sides if side == "validation"}
    assert held_out.isdisjoint(d.key for side, d in sides if side == "train")
    share = sum(len(d.text) for side, d in sides if side == "validation") / characters
    assert 0.02 < share < 0.1
