"""Per-layer overrides: ``{"0": {attention.sliding_window: 64}, "-1": {1.intermediate_size: 512}, "4-7": {...}}``.

A key selects layers (an index, a negative index, or an inclusive range ``a-b``); each path starts with a part of the
layer's block, by position or by ``type`` (when that type occurs once), and goes on to one of its fields.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from graft.config.base import PROBLEMS_ERROR, Problem
from graft.config.families import PartConfig

if TYPE_CHECKING:
    from graft.config.model import LayerParts, ModelConfig

_SELECTOR = re.compile(r"^(?P<first>-?\d+)(?:-(?P<last>\d+))?$")


def selected_layers(selector: str, num_layers: int) -> range:
    """The layers a selector names. Raises ValueError with the reason when it names none."""
    match = _SELECTOR.match(selector)
    if match is None:
        raise ValueError(f"'{selector}' is neither a layer (3, -1) nor a range (4-7)")
    first = int(match["first"])
    first = first + num_layers if first < 0 else first
    last = first if match["last"] is None else int(match["last"])
    if not 0 <= first <= last < num_layers:
        raise ValueError(f"'{selector}' is outside the {num_layers} layers")
    return range(first, last + 1)


def _part_index(key: str, parts: LayerParts) -> int:
    if key.isdigit():
        if int(key) >= len(parts):
            raise ValueError(f"the block has {len(parts)} parts, there is no part {key}")
        return int(key)
    found = [i for i, part in enumerate(parts) if getattr(part, "type", None) == key]
    if len(found) != 1:
        kinds = ", ".join(str(getattr(p, "type", "?")) for p in parts)
        raise ValueError(f"'{key}' names {len(found)} parts of the block [{kinds}], it must name one")
    return found[0]


def _set_path(data: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(data.get(key), dict):
            raise ValueError(f"'{key}' is not a table")
        data = data[key]
    data[path[-1]] = value


def _changed(part: PartConfig, changes: dict[str, Any]) -> PartConfig:
    data = {**part.model_dump(exclude_unset=True), "type": part.model_dump()["type"]}
    data = copy.deepcopy(data)
    for path, value in changes.items():
        _set_path(data, path.split("."), value)
    return type(part).model_validate(data)


def apply_overrides(model: ModelConfig, selector: str, layers: list[LayerParts]) -> None:
    """Applies one entry of ``model.overrides`` to ``layers`` in place. Raises ValueError with the reason."""
    changes: dict[str, dict[str, Any]] = {}
    for path, value in model.overrides[selector].items():
        head, _, rest = path.partition(".")
        if not rest:
            raise ValueError(f"'{path}' names a part but no field; write {path}.<field>")
        changes.setdefault(head, {})[rest] = value
    for layer in selected_layers(selector, model.num_layers):
        parts = list(layers[layer])
        for head, fields in changes.items():
            i = _part_index(head, layers[layer])
            parts[i] = _changed(parts[i], fields)
        layers[layer] = tuple(parts)


def layers(model: ModelConfig) -> tuple[LayerParts, ...]:
    """The parts of each physical layer with every override applied, in the order they are written."""
    built = [tuple(model.blocks[name]) for name in model.layer_blocks()]
    for selector in model.overrides:
        apply_overrides(model, selector, built)
    return tuple(built)


def _reasons(error: ValueError) -> Iterator[str]:
    if not isinstance(error, ValidationError):
        yield str(error)
        return
    for e in error.errors(include_url=False):
        if e["type"] == PROBLEMS_ERROR:
            yield from (p.message for p in e.get("ctx", {})["problems"])
        else:
            yield f"{'.'.join(map(str, e['loc']))}: {e['msg']}"


def override_problems(model: ModelConfig) -> Iterator[Problem]:
    """What is wrong with ``model.overrides``, one `Problem` each."""
    built = [tuple(model.blocks[name]) for name in model.layer_blocks()]
    for selector in model.overrides:
        try:
            apply_overrides(model, selector, built)
        except ValueError as error:  # pydantic's ValidationError is one
            for reason in _reasons(error):
                yield Problem(("overrides", selector), reason, "see 'graft parts' for the fields of a part")
