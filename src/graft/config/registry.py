"""Which variants exist: families, their registered config classes, discovery and plug-ins.

A *variant* is a frozen config class with a ``type`` tag in a family's base class (see `graft.config.families`).
Defining the class registers it. Built-in variants live in ``graft/<package>/<variant>_config.py`` (no torch) beside
their implementation ``graft/<package>/<variant>.py``; a config names it in ``implementation`` and builds it by import.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic_core import core_schema

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

_variants: dict[str, dict[str, type[Config]]] = {family: {} for family in PACKAGES}


def register(family: str, tag: str, cls: type[Config]) -> None:
    """Adds a variant. Raises ConfigError when the tag is taken by another class of the same family (or union)."""
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


def family_of(cls: type[Config]) -> str:
    """The family a variant's config class is registered in."""
    return next(f for f, members in _variants.items() if cls in members.values())


def load_plugins(names: tuple[str, ...]) -> None:
    """Imports the modules a config names in ``plugins:`` so that their variants register.

    Raises:
        ConfigError: a module cannot be imported, or fails while it is.
    """
    before = {family: dict(members) for family, members in _variants.items()}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"the plug-in '{name}' cannot be imported: {type(error).__name__}: {error}",
                where="plugins",
                fix="check the module's name and that it is on PYTHONPATH",
            ) from error
    if before != _variants:
        rebuild_schemas()


def rebuild_schemas() -> None:
    """Rebuilds every config class's validator, so that fields see variants registered after their first use."""
    from graft.config.base import Config

    pending = [Config]
    classes: list[type[Config]] = []
    while pending:
        cls = pending.pop()
        classes.append(cls)
        pending.extend(cls.__subclasses__())
    for cls in classes:  # first forget every schema, so that no parent is rebuilt on a child's old one
        for attribute in ("__pydantic_core_schema__", "__pydantic_validator__", "__pydantic_serializer__"):
            if attribute in cls.__dict__:
                delattr(cls, attribute)
        cls.__pydantic_complete__ = False
    for cls in classes:
        cls.model_rebuild(force=True)


class Family:
    """Annotation of a config field that holds any variant of a family, chosen by its ``type`` tag."""

    def __init__(self, name: str):
        self.name = name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices = {tag: handler.generate_schema(cls) for tag, cls in variants(self.name).items()}
        if not choices:
            return handler(source)
        return core_schema.tagged_union_schema(choices, discriminator="type")


def resolve(path: str) -> Any:
    """The object named ``package.module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
