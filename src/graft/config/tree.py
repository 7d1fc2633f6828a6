"""A config file as data that remembers where every key and value was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where something was written.

    Args:
        file: file name as the person gave it, or a description such as ``override 'model.x=3'``.
        line: line from 1, or None when there is none.
        col: column from 1, or None.
    """

    file: str
    line: int | None = None
    col: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.col) if part is not None)


@dataclass
class Node:
    """One value of a config file.

    Args:
        value: a scalar, a table of nodes, or a list of nodes.
        place: where the value starts.
        key_place: where its key starts; None in a list and at the top.
    """

    value: Scalar | dict[str, Node] | list[Node]
    place: Place
    key_place: Place | None = None

    def plain(self) -> Any:
        """The data alone: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The node below ``key``, or None."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def find(self, path: Path) -> tuple[Node, Path]:
        """The deepest node on ``path`` that exists, and the rest of the path."""
        node = self
        for i, key in enumerate(path):
            below = node.child(key)
            if below is None:
                return node, path[i:]
            node = below
        return node, ()

    def key_position(self) -> Place:
        """Where the key of this value is (the value itself in a list)."""
        return self.key_place or self.place


@dataclass(frozen=True)
class Located:
    """One problem of a config file, as people see it.

    Args:
        place: where it was written.
        path: the field, e.g. ``("model", "blocks", "b", 0, "num_heads")``.
        problem: what is wrong.
        fix: what to do, or None.
    """

    place: Place
    path: Path
    problem: str
    fix: str | None = None

    def __str__(self) -> str:
        """``file:line:col  path: problem; what to do``."""
        subject = f"{dotted(self.path)}: " if self.path else ""
        return f"{self.place}  {subject}{self.problem}" + (f"; {self.fix}" if self.fix else "")

    def to_dict(self) -> dict[str, Any]:
        """The same for ``--json``."""
        where = {"file": self.place.file, "line": self.place.line, "col": self.place.col}
        return {**where, "path": dotted(self.path), "problem": self.problem, "fix": self.fix}


@dataclass
class Document:
    """A file that was read: its tree, and what was wrong in it without making it unreadable (duplicate keys, …)."""

    root: Node
    problems: list[Located] = field(default_factory=list[Located])


ABSENT: Any = object()
"""What `entry` returns when there is nothing."""


def entry(data: Any, key: str | int) -> Any:
    """What plain data holds below ``key`` (of a table or a list), or `ABSENT`."""
    if isinstance(data, Mapping):
        return cast(Mapping[Any, Any], data).get(key, ABSENT)
    if isinstance(data, list | tuple) and isinstance(key, int):
        items = cast(Sequence[Any], data)
        return items[key] if 0 <= key < len(items) else ABSENT
    return ABSENT


def dotted(path: Sequence[str | int]) -> str:
    """``model.blocks.b.0.num_heads``; keys that contain a dot are quoted."""
    return ".".join(f'"{key}"' if isinstance(key, str) and ("." in key or not key) else str(key) for key in path)


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every node with its path, parents first."""
    yield path, node
    if isinstance(node.value, dict):
        for key, below in node.value.items():
            yield from walk(below, (*path, key))
    elif isinstance(node.value, list):
        for i, below in enumerate(node.value):
            yield from walk(below, (*path, i))


def from_plain(data: Any, place: Place) -> Node:
    """A tree whose every node was written at ``place``."""
    if isinstance(data, dict):
        return Node({str(key): from_plain(value, place) for key, value in cast(dict[Any, Any], data).items()}, place)
    if isinstance(data, list | tuple):
        return Node([from_plain(value, place) for value in cast(Sequence[Any], data)], place)
    return Node(data, place)
