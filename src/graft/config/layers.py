"""Per-layer overrides: ``{"0": {attention.sliding_window: 64}, "-1": {1.intermediate_size: 512}, "4-7": {...}}``.

A key selects layers (an index, a negative index, or an inclusive range ``a-b``); each path starts with a part of the
layer's block, by position or by ``type`` (when that type occurs once), and goes on to one of its fields; a table is
short for several paths: ``{"0": {attention: {sliding_window: 64, num_heads: 2}}}``. Changing a part's ``type`` replaces
the part: its old settings are gone. Entries apply in the order they are written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from graft.config.base import Problem
from graft.config.explain import explain
from graft.config.families import PartConfig
from graft.config.placement import chosen_layers, placement_problem
from graft.config.registry import variant, variants
from graft.config.tree import dotted

if TYPE_CHECKING:
    from graft.config.model import LayerParts, ModelConfig

_SELECTOR = re.compile(r"^(?P<first>-?\d+)(?:-(?P<last>\d+))?$")


class OverrideError(ValueError):
    """An entry of ``model.overrides`` that cannot be applied, with every reason."""

    def __init__(self, reasons: Sequence[str]):
        self.reasons = reasons
        super().__init__("; ".join(reasons))


def selected_layers(selector: str, num_layers: int) -> range:
    """The layers a selector names. Raises OverrideError with the reason when it names none."""
    match = _SELECTOR.match(selector)
    if match is None:
        raise OverrideError([f"'{selector}' is neither a layer (3, -1) nor a range (4-7)"])
    first = int(match["first"])
    first = first + num_layers if first < 0 else first
    last = first if match["last"] is None else int(match["last"])
    if not 0 <= first <= last < num_layers:
        raise OverrideError([f"'{selector}' is outside the {num_layers} layers"])
    return range(first, last + 1)


def _part_index(key: str, parts: LayerParts) -> int:
    if key.isdigit():
        if int(key) >= len(parts):
            raise OverrideError([f"the block has {len(parts)} parts, there is no part {key}"])
        return int(key)
    found = [i for i, part in enumerate(parts) if part.tag == key]
    if len(found) != 1:
        kinds = ", ".join(part.tag for part in parts)
        raise OverrideError([f"'{key}' names {len(found)} parts of the block [{kinds}], it must name one"])
    return found[0]


def _set_path(data: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(data.get(key), dict):
            raise OverrideError([f"'{'.'.join(path)}' goes through '{key}', which is not a table"])
        data = data[key]
    data[path[-1]] = value


def _changed(part: PartConfig, changes: dict[str, Any]) -> PartConfig:
    tag = changes.get("type", part.tag)
    cls = cast(type[PartConfig] | None, variant("part", tag))
    if cls is None:
        raise OverrideError([f"type: '{tag}' is no known type; one of {', '.join(variants('part'))}"])
    kept = part.model_dump(exclude_unset=True) if cls is type(part) else {}
    data: dict[str, Any] = copy.deepcopy({**kept, "type": tag})
    for path, value in changes.items():
        _set_path(data, path.split("."), value)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        found = explain(error, cls, data)
        reasons = [f"{dotted(i.path)}: {i.problem}" + (f"; {i.fix}" if i.fix else "") for i in found]
        raise OverrideError(reasons) from error


def _by_part(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Part key -> {path within the part: value}."""
    changes: dict[str, dict[str, Any]] = {}
    for path, value in entries.items():
        head, _, rest = path.partition(".")
        if rest:
            changes.setdefault(head, {})[rest] = value
        elif isinstance(value, Mapping):
            changes.setdefault(head, {}).update(cast(Mapping[str, Any], value))
        else:
            raise OverrideError([f"'{path}' names a part but no field; write {path}.<field>"])
    return changes


def apply_overrides(model: ModelConfig, selector: str, layers: list[LayerParts]) -> None:
    """Applies one entry of ``model.overrides`` to ``layers`` in place. Raises OverrideError with the reasons."""
    changes = _by_part(model.overrides[selector])
    done: dict[tuple[int, str], PartConfig] = {}  # layers of one block share their parts: each is changed once
    for layer in selected_layers(selector, model.num_layers):
        before = layers[layer]
        parts = list(before)
        for head, fields in changes.items():
            i = _part_index(head, before)
            key = (id(before[i]), head)
            if key not in done:
                done[key] = _changed(before[i], fields)
            parts[i] = done[key]
        layers[layer] = tuple(parts)


def branch_names(parts: LayerParts) -> list[str]:
    """A name per part: its type, numbered from the second of a kind on.

    Names do not depend on what else is in the block, so a layer that gains a part of another kind keeps the names, and
    with them the initial numbers, of all others.
    """
    seen: dict[str, int] = {}
    names: list[str] = []
    for part in parts:
        tag = part.tag
        seen[tag] = seen.get(tag, 0) + 1
        names.append(tag if seen[tag] == 1 else f"{tag}_{seen[tag]}")
    return names


def branches(model: ModelConfig) -> tuple[dict[str, PartConfig], ...]:
    """The parts that stand in each physical layer, by branch name, with every override applied in the order written."""
    built = [tuple(model.blocks[name]) for name in model.layer_blocks()]
    for selector in model.overrides:
        apply_overrides(model, selector, built)
    own = own_layers(model)
    chosen: dict[tuple[str, int], frozenset[int]] = {}

    def stands(part: PartConfig, block: str, layer: int) -> bool:
        if (block, id(part)) not in chosen:
            chosen[block, id(part)] = chosen_layers(part.layers, own[block], model.num_layers)
        return layer in chosen[block, id(part)]

    return tuple(
        {n: p for n, p in zip(branch_names(parts), parts, strict=True) if p.layers is None or stands(p, block, layer)}
        for layer, (block, parts) in enumerate(zip(model.layer_blocks(), built, strict=True))
    )


def own_layers(model: ModelConfig) -> dict[str, list[int]]:
    """Block name -> the physical layers that have it."""
    own: dict[str, list[int]] = {name: [] for name in model.blocks}
    for layer, name in enumerate(model.layer_blocks()):
        own[name].append(layer)
    return own


def override_problems(model: ModelConfig) -> Iterator[Problem]:
    """What is wrong with ``model.overrides``, one `Problem` each."""
    built = [tuple(model.blocks[name]) for name in model.layer_blocks()]
    for selector in model.overrides:
        try:
            apply_overrides(model, selector, built)
        except OverrideError as error:
            for reason in error.reasons:
                yield Problem(("overrides", selector), reason)
    yield from _changed_problems(model, built)
    yield from _idle_overrides(model, built)
    yield from _placement_problems(model, built)
    yield from _joint_problems(model, built)
    yield from _passing_problems(model, built)


def _idle_overrides(model: ModelConfig, built: list[LayerParts]) -> Iterator[Problem]:
    """Overrides of parts that stand in none of the layers they name."""
    own, blocks = own_layers(model), model.layer_blocks()
    for selector, entries in model.overrides.items():
        try:
            selected, changes = selected_layers(selector, model.num_layers), _by_part(entries)
            named = {head: [(i, built[i][_part_index(head, built[i])]) for i in selected] for head in changes}
        except OverrideError:
            continue  # reported where it is applied
        for head, parts in named.items():
            standing = (i in chosen_layers(part.layers, own[blocks[i]], model.num_layers) for i, part in parts)
            if "layers" not in changes[head] and not any(standing):
                yield Problem(
                    ("overrides", selector),
                    f"'{head}' stands in none of these layers",
                    "remove it, or move the part",
                )


def _placement_problems(model: ModelConfig, built: list[LayerParts]) -> Iterator[Problem]:
    """What is wrong with the ``layers`` of parts."""
    own, blocks, seen = own_layers(model), model.layer_blocks(), set[tuple[str, int]]()
    for layer, parts in enumerate(built):
        for i, part in enumerate(parts):
            if (blocks[layer], id(part)) in seen:
                continue
            seen.add((blocks[layer], id(part)))
            found = placement_problem(part.layers, own[blocks[layer]], model.num_layers)
            if found is not None:
                yield Problem((*_place(model, blocks[layer], i, part), "layers"), *found)


def _joint_problems(model: ModelConfig, built: list[LayerParts]) -> Iterator[Problem]:
    """What parts say about the model's direction, and about what they share with each other."""
    seen: set[int] = set()
    shared: dict[str, tuple[Any, ...]] = {}
    for layer, (block, parts) in enumerate(zip(model.layer_blocks(), built, strict=True)):
        for i, part in enumerate(parts):
            if id(part) in seen:
                continue
            seen.add(id(part))
            place = _place(model, block, i, part)
            for problem in part.problems_when(model.bidirectional):
                yield Problem((*place, *problem.path), f"layer {layer}: {problem.message}", problem.fix)
            for name, definition in part.shares().items():
                if shared.setdefault(name, definition) != definition:
                    yield Problem(place, f"two parts share '{name}' and define it differently", "name them apart")


def _passing_problems(model: ModelConfig, built: list[LayerParts]) -> Iterator[Problem]:
    """Layers that mix in what the first of their kind passes on, and have it in another shape."""
    own, blocks = own_layers(model), model.layer_blocks()
    first: dict[str, tuple[int, tuple[int, ...]]] = {}
    told: set[int] = set()
    for layer, (block, parts) in enumerate(zip(blocks, built, strict=True)):
        for i, part in enumerate(parts):
            if id(part) in told or layer not in chosen_layers(part.layers, own[block], model.num_layers):
                continue
            for name, shape in part.passes_on(model.hidden_size).items():
                source, wanted = first.setdefault(name, (layer, shape))
                if shape != wanted:
                    told.add(id(part))
                    yield Problem(
                        _place(model, block, i, part),
                        f"layer {layer}: {name} of heads (number, size) = {shape} cannot mix in that of "
                        f"layer {source}, {wanted}",
                        f"give all layers with {name} the same num_kv_heads and head_dim",
                    )


def _place(model: ModelConfig, block: str, i: int, part: PartConfig) -> tuple[str | int, ...]:
    """Where a part was written: in its block, or (changed) in the overrides."""
    return ("blocks", block, i) if part is model.blocks[block][i] else ("overrides",)


def _changed_problems(model: ModelConfig, built: list[LayerParts]) -> Iterator[Problem]:
    """What the changed parts cannot be in the model, and those of the blocks, judged by the model itself, were not."""
    seen: set[int] = set()
    for layer, (block, parts) in enumerate(zip(model.layer_blocks(), built, strict=True)):
        for original, part in zip(model.blocks[block], parts, strict=True):
            if part is original or id(part) in seen:
                continue
            seen.add(id(part))
            told = {problem.message for problem in model.problems_of(original)}
            for problem in model.problems_of(part):
                if problem.message not in told:
                    yield Problem(("overrides",), f"layer {layer}: {problem.message}", problem.fix)
