"""TOML with the line of every key.

``tomllib`` reads; it gives no places, so keys are looked up in the text: headers and ``key = value`` lines are exact,
what sits inside an inline value has the place of the key it belongs to.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from typing import Any, cast

from graft.config.report import one_problem
from graft.config.tree import Document, Located, Node, Path, Place
from graft.config.yaml_reader import MAX_DEPTH, MAX_INTEGER

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"^\s*(\[\[?)\s*({_DOTTED})\s*\]")
_ASSIGNMENT = re.compile(rf"^(\s*)({_DOTTED})\s*=\s*")


def read_toml(text: str, shown: str) -> Document:
    """Reads TOML text.

    Raises:
        ConfigProblems: it is not TOML, or nests too deep.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        reason = re.sub(r" \(at .*\)$", "", str(error))
        line, col = (int(at[1]), int(at[2])) if at else (None, None)
        raise one_problem(shown, f"not TOML: {reason}", line=line, col=col) from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        reason = "the values nest too deep" if isinstance(error, RecursionError) else str(error)
        raise one_problem(shown, f"not TOML: {reason}") from None
    places = _places(text, shown)
    problems: list[Located] = []
    return Document(_node(data, (), places, places[()], problems, shown), problems)


def _node(data: Any, path: Path, places: dict[Path, Place], parent: Place, problems: list[Located], shown: str) -> Node:
    place = places.get(path, parent)
    if len(path) > MAX_DEPTH:
        raise one_problem(shown, "the values nest too deep", f"at most {MAX_DEPTH} levels", line=place.line)
    if isinstance(data, dict):
        table: dict[str, Node] = {}
        for key, value in cast(dict[str, Any], data).items():
            table[key] = _node(value, (*path, key), places, place, problems, shown)
            table[key].key_place = table[key].place
        return Node(table, place)
    if isinstance(data, list):
        return Node(
            [_node(v, (*path, i), places, place, problems, shown) for i, v in enumerate(cast(list[Any], data))], place
        )
    if isinstance(data, datetime.date | datetime.time):
        problems.append(Located(place, path, "a date is no setting", "put quotes around it"))
        data = str(data)
    if isinstance(data, int) and abs(data) > MAX_INTEGER:
        problems.append(Located(place, path, f"'{str(data)[:40]}' does not fit 64 bits"))
        data = str(data)
    return Node(data, place)


def _parts(dotted_key: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_KEY, dotted_key))


def _places(text: str, shown: str) -> dict[Path, Place]:
    """Path -> place of every key that starts a line or a header."""
    places: dict[Path, Place] = {(): Place(shown, 1, 1)}
    counts: dict[Path, int] = {}
    table: Path = ()
    closing: str | None = None  # the delimiter that ends the multi-line text being skipped
    for number, line in enumerate(text.splitlines(), 1):
        if closing is not None:
            closing = None if closing in line else closing
            continue
        if header := _HEADER.match(line):
            table = _table_path(_parts(header[2]), header[1] == "[[", counts)
            for n in range(1, len(table) + 1):
                places.setdefault(table[:n], Place(shown, number, header.start(2) + 1))
        elif assignment := _ASSIGNMENT.match(line):
            path = (*table, *_parts(assignment[2]))
            for n in range(len(table) + 1, len(path) + 1):
                places.setdefault(path[:n], Place(shown, number, len(assignment[1]) + 1))
            closing = _opened(line[assignment.end() :])
    return places


def _table_path(keys: tuple[str, ...], is_array: bool, counts: dict[Path, int]) -> Path:
    """The path of a header; tables inside an array of tables belong to its newest entry."""
    path: Path = ()
    for i, key in enumerate(keys):
        path = (*path, key)
        if is_array and i == len(keys) - 1:
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = (*path, counts[path] - 1)
    return path


def _opened(value: str) -> str | None:
    for quotes in ('"' * 3, "'" * 3):
        if value.count(quotes) % 2:
            return quotes
    return None
