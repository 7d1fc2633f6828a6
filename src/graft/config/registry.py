"""Which variants exist: families, their registered config classes, discovery and plug-ins.

A *variant* is a frozen config class with a ``type`` tag in a family's base class (see `graft.config.families`).
Defining the class registers it. Built-in variants live in ``graft/<package>/<variant>_config.py`` (no torch) beside
their implementation ``graft/<package>/<variant>.py``; a config names it in ``implementation`` and builds it by import.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import SchemaValidator, core_schema

from graft.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

    from graft.config.base import Config

PACKAGES: dict[str, str] = {
    "token_mixer": "graft.token_mixers",
    "channel_mixer": "graft.channel_mixers",
    "memory": "graft.memories",
    "norm": "graft.norms",
    "position": "graft.positions",
    "linear": "graft.linears",
    "objective": "graft.objectives",
    "optimizer": "graft.optimizers",
    "schedule": "graft.schedules",
    "source": "graft.data.sources",
    "tokenizer": "graft.data.tokenizers",
    "packing": "graft.data.packing",
}
"""Family -> the package whose ``*_config`` modules hold its built-in variants."""

UNIONS: dict[str, tuple[str, ...]] = {"part": ("token_mixer", "channel_mixer", "memory")}
"""Families that are made of others: everything that may join the residual stream is a part."""

FAMILY_KEYWORD = "graft-family"
"""In pydantic's JSON Schema, the table ``{"graft-family": name}`` stands for any variant of a family."""

_variants: dict[str, dict[str, type[Config]]] = {family: {} for family in PACKAGES}


def register(family: str, tag: str, cls: type[Config]) -> None:
    """Adds a variant.

    Raises:
        ConfigError: the tag is taken by another class of the same family (or union), or the class builds nothing.
    """
    taken = {**_variants[family]}
    for members in UNIONS.values():
        if family in members:
            for member in members:
                taken |= _variants[member]
    known = taken.get(tag)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(
            f"the type '{tag}' of family '{family}' is defined twice",
            where=f"{cls.__module__}.{cls.__qualname__}",
            expected=f"a tag other than that of {known.__module__}.{known.__qualname__}",
        )
    if not getattr(cls, "implementation", None):
        raise ConfigError(
            f"the type '{tag}' of family '{family}' does not say what it builds",
            where=f"{cls.__module__}.{cls.__qualname__}",
            fix='set implementation = "module:Class"',
        )
    _variants[family][tag] = cls


@cache
def discover() -> None:
    """Imports every built-in variant's config module (no torch). Idempotent."""
    for package_name in PACKAGES.values():
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_config"):
                importlib.import_module(f"{package_name}.{module.name}")


def variants(family: str) -> dict[str, type[Config]]:
    """Tag -> config class of a family (or union of families), built-in and plugged in, sorted by tag."""
    discover()
    members = UNIONS.get(family, (family,))
    merged = {tag: cls for member in members for tag, cls in _variants[member].items()}
    return dict(sorted(merged.items()))


def variant(family: str, tag: object) -> type[Config] | None:
    """The config class with this tag in a family (or union of families), or None. Imports no other built-in variant."""
    if not isinstance(tag, str):
        return None
    for member in UNIONS.get(family, (family,)):
        module = f"{PACKAGES[member]}.{tag}_config"
        if tag not in _variants[member] and tag.isidentifier() and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
        if tag in _variants[member]:
            return _variants[member][tag]
    return None


def family_of(cls: type[Config]) -> str:
    """The family a variant's config class is registered in."""
    return next(f for f, members in _variants.items() if cls in members.values())


def load_plugins(names: tuple[str, ...]) -> None:
    """Imports the modules a config names in ``plugins:`` so that their variants register.

    The working directory becomes importable (it comes last, so it shadows nothing).

    Raises:
        ConfigError: a module cannot be imported, or fails while it is.
    """
    if names:
        discover()  # so that a tag of a built-in variant is refused
        make_importable(Path.cwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ConfigError as error:  # of a variant it registers
            raise ConfigError(f"the plug-in '{name}' cannot be used: {error}", where="plugins") from error
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            raise ConfigError(
                f"the plug-in '{name}' cannot be imported: {type(error).__name__}: {error}",
                where="plugins",
                fix="check the module's name and that it is on PYTHONPATH" if missing else f"see {_last_line(error)}",
            ) from error


def _last_line(error: BaseException) -> str:
    """File and line an error came from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def make_importable(*folders: Path) -> None:
    """Adds folders to the end of the module path."""
    sys.path += [str(folder) for folder in folders if str(folder) not in sys.path]


def plugin_modules() -> set[str]:
    """The modules of plugged-in variants, of their configs and of what these build."""
    classes = [cls for members in _variants.values() for cls in members.values()]
    named = {cls.__module__ for cls in classes} | {
        getattr(cls, "implementation", "").partition(":")[0] for cls in classes
    }
    return {name for name in named if name.partition(".")[0] != "graft"}


class Family:
    """Annotation of a config field that holds any variant of a family, chosen by its ``type`` tag.

    The variant is looked up when a value is validated, not when the field is defined: only the variants a config uses
    are imported and get a validator, and a plug-in's variants are seen wherever their family is.
    """

    def __init__(self, name: str):
        self.name = name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(self._decode)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: object) -> dict[str, Any]:
        return {FAMILY_KEYWORD: self.name}

    def _decode(self, value: Any, info: core_schema.ValidationInfo) -> Config:
        tag = cast(dict[str, Any], value).get("type") if isinstance(value, dict) else getattr(value, "type", None)
        cls = variant(self.name, tag)
        # without one, the union of all says what is wrong
        union = {str(tag): cls} if cls is not None else variants(self.name)
        schema = core_schema.tagged_union_schema({tag: _decoder(cls) for tag, cls in union.items()}, "type")
        return SchemaValidator(schema).validate_python(value, context=info.context)


def _decoder(cls: type[Config]) -> core_schema.CoreSchema:
    def decode(value: Any, info: core_schema.ValidationInfo) -> Config:
        return cls.model_validate(value, context=info.context)

    return core_schema.with_info_plain_validator_function(decode)


def resolve(path: str) -> Any:
    """The object named ``package.module:attribute``.

    Raises:
        ConfigError: a plug-in names one that there is not.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        if module in plugin_modules():
            raise ConfigError(
                f"the implementation '{path}' cannot be imported: {error}", expected='"module:Class"'
            ) from error
        raise
