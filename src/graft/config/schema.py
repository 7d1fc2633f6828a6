"""JSON Schema (2020-12) of config files, for completion and checks in editors.

Save it with ``graft schema --out graft.schema.json`` and put
``# yaml-language-server: $schema=graft.schema.json`` on the first line of a config (VS Code's YAML extension and every
editor with yaml-language-server read it). Cross-field rules are not in it: ``graft check`` knows those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from pydantic.json_schema import models_json_schema

from graft.config.base import Config, OnlyIf
from graft.config.experiment import Experiment
from graft.config.registry import FAMILY_KEYWORD, PACKAGES, UNIONS, variants

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DEFS = "#/$defs/"
_PARTIAL = "partial."


def config_schema() -> dict[str, Any]:
    """The schema of a whole config file, with the variants that are registered now.

    A file with ``base`` may leave out anything, so every definition is there twice: in full, and as ``partial.…``.
    """
    families = {family: list(variants(family).values()) for family in (*PACKAGES, *UNIONS)}
    classes = dict.fromkeys((Experiment, *(cls for members in families.values() for cls in members)))
    references, schema = models_json_schema([(cls, "validation") for cls in classes], ref_template=_DEFS + "{model}")

    def tidy(table: dict[str, Any]) -> dict[str, Any]:
        # the keyword discriminator is not JSON Schema's: the tag's ``const`` says the same
        dropped = (FAMILY_KEYWORD, "discriminator") if "oneOf" in table else (FAMILY_KEYWORD,)
        rest = {key: item for key, item in table.items() if key not in dropped}
        members = families.get(table.get(FAMILY_KEYWORD, ""), ())
        return {"oneOf": [references[cls, "validation"] for cls in members], **rest} if members else rest

    full = {name: _map_tables(definition, tidy) for name, definition in schema["$defs"].items()}
    partial = {_PARTIAL + name: _map_tables(definition, _loosen) for name, definition in full.items()}
    base = {"type": "string", "description": "config to start from: a path from this file, or presets/…"}
    partial[_PARTIAL + "Experiment"]["properties"]["base"] = base
    return {
        "$schema": DIALECT,
        "title": "graft config",
        "description": "Everything a run needs: the network, its data, and how it is trained",
        "type": "object",
        "if": {"required": ["base"]},
        "then": {"$ref": f"{_DEFS}{_PARTIAL}Experiment"},
        "else": {"$ref": f"{_DEFS}Experiment"},
        "$defs": full | partial,
    }


def complete(definition: dict[str, Any], cls: type[Config]) -> None:
    """Adds to the definition of one config class what pydantic leaves out: computed defaults, conditions, the tag as a
    must, null for removed entries. `Config` calls it while pydantic makes the schema."""
    properties: dict[str, Any] = definition.get("properties", {})
    for name, info in cls.model_fields.items():
        entry = properties[name]
        entry.pop("title", None)
        if info.default_factory is not None:
            default = info.get_default(call_default_factory=True)
            entry["default"] = default.to_dict() if isinstance(default, Config) else default
        conditions = [rule.describe() for rule in info.metadata if isinstance(rule, OnlyIf)]
        if conditions:
            entry["description"] = f"{info.description or ''} (acts only if {' and '.join(conditions)})".strip()
    if "type" in properties:
        definition["required"] = ["type", *(n for n in definition.get("required", []) if n != "type")]
        properties["type"]["description"] = "which variant this is"
    for name in cls.removable:
        entry = properties[name]
        entry["additionalProperties"] = {"anyOf": [entry["additionalProperties"], {"type": "null"}]}


def _map_tables(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of ``value`` with ``change`` applied to every table in it, insides first."""
    if isinstance(value, list):
        return [_map_tables(item, change) for item in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    return change({key: _map_tables(item, change) for key, item in cast(dict[str, Any], value).items()})


def _loosen(table: dict[str, Any]) -> dict[str, Any]:
    """Nothing required, not even the tag, and references to the loosened definitions."""
    loose = {key: item for key, item in table.items() if not (key == "required" and isinstance(item, list))}
    if "oneOf" in loose:  # without tags several alternatives may fit
        loose["anyOf"] = loose.pop("oneOf")
    reference = loose.get("$ref")
    if isinstance(reference, str) and reference.startswith(_DEFS):
        loose["$ref"] = _DEFS + _PARTIAL + reference.removeprefix(_DEFS)
    return loose
