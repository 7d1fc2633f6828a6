"""Dotted overrides from the command line: ``model.hidden_size=256``, ``model.blocks.b.0.num_heads=8``.

An override is a tiny document laid over the config by the rule of `graft.config.merge`, in the order given. The value
is YAML (``[1, 2]``, ``{type: layer_norm}``, ``1e-4``, ``null``), a changed ``type`` replaces the whole table. Lists are
indexed by number; the number after the last one appends. Keys that contain dots are quoted:
``model.overrides.0."attention.sliding_window"=64``. New keys are allowed: validation judges them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from graft.config.merge import merge
from graft.config.report import ConfigProblems
from graft.config.tree import Located, Node, Path, Place
from graft.config.yaml_reader import read_yaml

_KEY = re.compile(r'"([^"]+)"|([^."=]+)')


def apply_overrides(root: Node, overrides: Iterable[str]) -> tuple[Node, list[Located]]:
    """The config with every override applied, and the overrides that make no sense."""
    problems: list[Located] = []
    for text in overrides:
        place = Place(f"override '{text}'")
        try:
            path, value = parse_override(text, place)
            root = _laid_over(root, path, (), value)
        except ConfigProblems as error:
            problems += error.problems
    return root, problems


def parse_override(text: str, place: Place) -> tuple[tuple[str, ...], Node]:
    """Path and value of ``a.b.c=value``.

    Raises:
        ConfigProblems: it has no ``=``, no value, a malformed path, or a value that is no YAML.
    """
    keys: list[str] = []
    at = 0
    while match := _KEY.match(text, at):
        keys.append(match[1] or match[2].strip())
        at = match.end()
        if text[at : at + 1] != ".":
            break
        at += 1
    if text[at : at + 1] != "=" or not keys or (at and text[at - 1] == "."):
        raise ConfigProblems([Located(place, (), "it is not of the form path.to.field=value")])
    if not text[at + 1 :].strip():
        raise ConfigProblems([Located(place, tuple(keys), "it has no value", f"write {text.strip()}null for no value")])
    document = read_yaml(text[at + 1 :], place.file, fixed_place=place)
    if document.problems:
        raise ConfigProblems(document.problems)
    return tuple(keys), document.root


def _laid_over(node: Node | None, keys: tuple[str, ...], done: Path, value: Node) -> Node:
    """``node`` with ``value`` laid over what is at ``keys``; tables are made as needed."""
    if not keys:
        return merge(node, value) if node is not None else value
    key, rest = keys[0], keys[1:]
    if node is not None and isinstance(node.value, list):
        return _in_list(node, key, rest, done, value)
    table = node.value if node is not None and isinstance(node.value, dict) else {}
    new = _laid_over(table.get(key), rest, (*done, key), value)
    new.key_place = new.key_place or value.place
    # a one-key table laid over this one: the merge rule then sees a changed type
    above = Node({key: new}, value.place)
    if node is None or not isinstance(node.value, dict):
        return above
    merged = merge(node, above)
    return Node(merged.value, node.place, node.key_place)


def _in_list(node: Node, key: str, rest: tuple[str, ...], done: Path, value: Node) -> Node:
    assert isinstance(node.value, list)
    size = len(node.value)
    if not key.isdigit() or int(key) > size:
        have = f"items 0 to {size - 1}" if size else "no items"
        fix = f"use {size} to append" if key.lstrip("-").isdigit() else "a list is indexed by number"
        raise ConfigProblems([Located(value.place, (*done, key), f"the list has {have}, not '{key}'", fix)])
    items = list(node.value)
    i = int(key)
    old = items[i] if i < size else None
    items[i : i + 1] = [_laid_over(old, rest, (*done, i), value)]
    return Node(items, node.place, node.key_place)
