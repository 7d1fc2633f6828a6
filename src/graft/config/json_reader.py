"""JSON with the place of every key and value.

The standard library decides what is JSON; a second pass over the valid text notes the places. YAML would read most JSON
too, but differs on tabs and on escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from graft.config.report import one_problem
from graft.config.tree import Document, Located, Node, Path, Place
from graft.config.yaml_reader import MAX_DEPTH, MAX_INTEGER, MAX_VALUES

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def read_json(text: str, shown: str) -> Document:
    """Reads JSON text.

    Raises:
        ConfigProblems: it is not JSON, nests too deep, or holds too many values.
    """
    try:
        json.loads(text, parse_int=str, parse_float=str)  # numbers are judged with their place, below
    except json.JSONDecodeError as error:
        raise one_problem(shown, f"not JSON: {error.msg}", line=error.lineno, col=error.colno) from error
    except RecursionError:
        raise one_problem(shown, "the values nest too deep", f"at most {MAX_DEPTH} levels") from None
    reader = _Reader(text, shown)
    root = reader.value((), 0)
    return Document(root, reader.problems)


def _tokens(text: str, shown: str) -> Iterator[tuple[str, Place]]:
    line, line_start, last = 1, 0, 0
    for match in _TOKEN.finditer(text):
        newlines = text.count("\n", last, match.start())
        if newlines:
            line += newlines
            line_start = text.rfind("\n", last, match.start()) + 1
        last = match.start()
        yield match.group(), Place(shown, line, match.start() - line_start + 1)


class _Reader:
    """Walks the tokens of text that is known to be JSON; one use."""

    def __init__(self, text: str, shown: str):
        self.shown = shown
        end = ("", Place(shown))
        self.stream = pairwise([*_tokens(text, shown), end])
        self.problems: list[Located] = []
        self.values = 0
        self._step()

    def _step(self) -> None:
        (self.token, self.place), (self.ahead, _) = next(self.stream)

    def value(self, path: Path, depth: int) -> Node:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            problem = f"more than {MAX_VALUES} values" if self.values > MAX_VALUES else "the values nest too deep"
            raise one_problem(self.shown, problem, line=self.place.line, col=self.place.col)
        place = self.place
        if self.token == "{":
            return Node(self._table(path, depth), place)
        if self.token == "[":
            return Node(self._list(path, depth), place)
        return Node(self._scalar(path), place)

    def _table(self, path: Path, depth: int) -> dict[str, Node]:
        table: dict[str, Node] = {}
        while self.ahead != "}":
            self._step()
            if self.token == ",":
                self._step()
            key, key_place = json.loads(self.token), self.place
            self._step()  # the colon
            self._step()
            below = self.value((*path, key), depth + 1)
            below.key_place = key_place
            if key in table:
                first = table[key].key_position().line
                problem = f"the key is given twice (first in line {first})"
                self.problems.append(Located(key_place, (*path, key), problem, "keep one"))
            else:
                table[key] = below
        self._step()
        return table

    def _list(self, path: Path, depth: int) -> list[Node]:
        items: list[Node] = []
        while self.ahead != "]":
            self._step()
            if self.token == ",":
                self._step()
            items.append(self.value((*path, len(items)), depth + 1))
        self._step()
        return items

    def _scalar(self, path: Path) -> Any:
        if re.fullmatch(r"-?\d+", self.token) and (
            len(self.token) > 20 or abs(int(self.token)) > MAX_INTEGER
        ):  # int() refuses thousands of digits, so their number is looked at first
            self.problems.append(Located(self.place, path, f"'{self.token[:40]}' does not fit 64 bits"))
            return self.token
        return json.loads(self.token)
