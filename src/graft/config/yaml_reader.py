"""YAML 1.2 with the place of every key and value.

ruamel.yaml parses; the nodes it composes (text, tag, mark) are turned into values here, because its constructors lose
the places of scalars and expand aliases without a bound. Beyond the core schema, ``<<`` merges the keys of another
table (they give way to the ones written out); dates stay text; ``1e-4`` is a number and ``yes`` is text.
"""

# pyright: basic
# (ruamel.yaml's nodes and errors carry no types)

from __future__ import annotations

import math
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from graft.config.report import one_problem
from graft.config.tree import Document, Located, Node, Path, Place, Scalar

MAX_DEPTH = 40
MAX_VALUES = 50_000
MAX_INTEGER = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + name for name in ("str", "timestamp", "value")}


def read_yaml(text: str, shown: str, *, fixed_place: Place | None = None) -> Document:
    """Reads YAML text.

    Args:
        text: the document.
        shown: how messages name it.
        fixed_place: the place of everything in it, when lines and columns mean nothing (an override).

    Raises:
        ConfigProblems: it is not YAML 1.2, nests too deep, or holds too many values.
    """
    node = _compose(text, shown, fixed_place)
    if node is None:
        return Document(Node(None, fixed_place or Place(shown, 1, 1)))
    reader = _Reader(shown, fixed_place)
    return Document(reader.read(node, (), 0), reader.problems)


def _compose(text: str, shown: str, fixed_place: Place | None) -> Any:
    if text.startswith("%YAML") and not text.startswith("%YAML 1.2"):
        raise one_problem(shown, "only YAML 1.2 is read", "remove the %YAML line", line=1, col=1)
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = True  # reported by `_Reader`, with the place of both
    try:
        _check_nesting(text, shown, fixed_place)
        return yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem, fix = _explain(error)
        at = (None, None) if fixed_place or mark is None else (mark.line + 1, mark.column + 1)
        raise one_problem(shown, problem, fix, line=at[0], col=at[1]) from error
    except YAMLError as error:  # characters YAML forbids
        reason = str(error).splitlines()[0]
        raise one_problem(shown, f"not YAML: {reason}", "remove the special character") from error


def _check_nesting(text: str, shown: str, fixed_place: Place | None) -> None:
    """Stops at the first value that nests too deep: composing would recurse, and scan ever slower, all the way down."""
    depth = 0
    for event in YAML(typ="rt").parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            mark = event.start_mark
            at = (None, None) if fixed_place else (mark.line + 1, mark.column + 1)
            fix = f"at most {MAX_DEPTH} levels"
            raise one_problem(shown, "the values nest too deep", fix, line=at[0], col=at[1])


def _explain(error: MarkedYAMLError) -> tuple[str, str | None]:
    problem = error.problem or "it is not YAML"
    if "'\\t'" in problem:
        return "a tab cannot indent in YAML", "use spaces"
    if "mapping values are not allowed" in problem:
        return "a ':' where no key can be", "check the indentation, or put quotes around text that contains ': '"
    if "undefined alias" in problem:
        return problem, "define the anchor (&name) before it is used (*name)"
    if "but found another document" in problem:
        return "the file holds more than one YAML document", "remove the '---' lines"
    return f"not YAML: {problem}" + (f" {error.context}" if error.context else ""), None


class _Reader:
    """Turns composed nodes into a tree, collecting problems; one use."""

    def __init__(self, shown: str, fixed_place: Place | None):
        self.shown = shown
        self.fixed_place = fixed_place
        self.problems: list[Located] = []
        self.values = 0

    def place(self, node: Any) -> Place:
        return self.fixed_place or Place(self.shown, node.start_mark.line + 1, node.start_mark.column + 1)

    def report(self, node: Any, path: Path, problem: str, fix: str | None = None) -> None:
        self.problems.append(Located(self.place(node), path, problem, fix))

    def read(self, node: Any, path: Path, depth: int) -> Node:
        self.values += 1
        place = self.place(node)
        if self.values > MAX_VALUES:  # aliases are counted each time: this is what stops an alias bomb
            raise one_problem(
                self.shown,
                f"more than {MAX_VALUES} values once aliases are expanded",
                "a config is small: remove aliases of aliases",
                line=place.line,
                col=place.col,
            )
        if depth > MAX_DEPTH:
            raise one_problem(
                self.shown, "the values nest too deep", f"at most {MAX_DEPTH} levels", line=place.line, col=place.col
            )
        if isinstance(node, MappingNode):
            return Node(self._table(node, path, depth), place)
        if isinstance(node, SequenceNode):
            return Node([self.read(item, (*path, i), depth + 1) for i, item in enumerate(node.value)], place)
        return Node(self._scalar(node, path), place)

    def _table(self, node: MappingNode, path: Path, depth: int) -> dict[str, Node]:
        table: dict[str, Node] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += self._merge_key(value_node, path, depth)
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in table:
                first = table[key].key_position()
                where = f" in line {first.line}" if first.line else ""
                self.report(key_node, (*path, key), f"the key is given twice (first{where})", "keep one")
                continue
            below = self.read(value_node, (*path, key), depth + 1)
            below.key_place = self.place(key_node)
            if below.value is None:  # an empty value starts at the next token, which would mislead
                below.place = below.key_place
            table[key] = below
        for source in merged:
            assert isinstance(source.value, dict)
            for key, below in source.value.items():
                table.setdefault(key, below)
        return table

    def _merge_key(self, node: Any, path: Path, depth: int) -> list[Node]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        found = [self.read(source, path, depth + 1) for source in sources]
        if not all(isinstance(source.value, dict) for source in found):
            self.report(node, path, "'<<' takes a table or a list of tables", "give it an alias of a table")
        return [source for source in found if isinstance(source.value, dict)]

    def _key(self, node: Any, path: Path) -> str | None:
        """Keys are text; whole numbers (layer 0, -1) are taken as text."""
        if isinstance(node, ScalarNode) and node.tag in _TEXT_TAGS | {_TAG + "int"}:
            return str(node.value)
        self.report(node, path, "a key is text", "put quotes around it")
        return None

    def _scalar(self, node: Any, path: Path) -> Scalar:
        text: str = node.value
        kind = str(node.tag).removeprefix(_TAG)
        if node.tag in _TEXT_TAGS:
            return text
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return _integer(text)
            if kind == "float":
                return _float(text)
        except (KeyError, ValueError) as error:
            reason = f": {error}" if isinstance(error, ValueError) else ""
            self.report(node, path, f"'{text[:40]}' is no {kind}{reason}")
            return text
        self.report(node, path, f"the YAML tag '{node.tag}' is not allowed", "write plain values")
        return text


def _integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    unsigned = digits.lstrip("+-")
    base = {"0x": 16, "0o": 8, "0b": 2}.get(unsigned[:2], 10)
    number = int(digits, base)
    if abs(number) > MAX_INTEGER:
        raise ValueError("it does not fit 64 bits")
    return number


def _float(text: str) -> float:
    """NaN and infinities are read (and refused by the field they are for); a number that overflows is an error."""
    digits = text.replace("_", "").lower()
    if digits.lstrip("+-") in (".inf", ".nan"):
        return float(digits.replace(".", ""))
    number = float(digits)
    if math.isinf(number):
        raise ValueError("it does not fit a 64-bit float")
    return number
