"""How one config is laid over another: the rule of ``base:`` includes and of command-line overrides.

- Tables merge key by key.
- Lists and scalars replace what was there.
- A table whose ``type`` differs from the one below replaces that table whole: the settings of one variant mean nothing
  to another. A table without a ``type``, or with the same one, merges.
- ``null`` is a value like any other: it replaces. (In ``model.blocks`` and ``model.overrides`` it removes the entry.)

The result remembers where each surviving key and value was written.
"""

from __future__ import annotations

from graft.config.tree import Node


def merge(below: Node, above: Node) -> Node:
    """``above`` laid over ``below`` by the module's rule. Neither is changed."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict) or _type_changes(below, above):
        return above
    table = dict(below.value)
    for key, node in above.value.items():
        table[key] = merge(table[key], node) if key in table else node
    return Node(table, above.place, above.key_place)


def _type_changes(below: Node, above: Node) -> bool:
    old, new = below.child("type"), above.child("type")
    return old is not None and new is not None and old.value != new.value
