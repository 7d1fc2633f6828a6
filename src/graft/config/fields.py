"""What a place in a config may hold: walks the annotations of the config classes; the data chooses among variants."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from graft.config.base import Config
from graft.config.families import PartConfig, VariantConfig
from graft.config.registry import variant, variants
from graft.config.tree import Path, entry


def family_name(cls: type[Any]) -> str | None:
    """The family a base config class stands for (its variants are chosen by ``type``), or None for a plain config."""
    if not issubclass(cls, VariantConfig) or "type" in cls.model_fields:
        return None
    return cls.family or ("part" if issubclass(cls, PartConfig) else None)


def tag_of(cls: type[Config]) -> str | None:
    """The ``type`` tag of a config class, or None."""
    info = cls.model_fields.get("type")
    return get_args(info.annotation)[0] if info is not None and get_origin(info.annotation) is Literal else None


def members(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without ``Annotated`` and ``None``."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for alternative in get_args(annotation):
            yield from members(alternative)
    elif annotation is not type(None):
        yield annotation


def config_class(annotation: Any, data: Any) -> type[Config] | None:
    """The config class that decodes ``data`` (a table) where ``annotation`` is expected, or None if there is none."""
    tag = entry(data, "type")
    for cls in members(annotation):
        if not isinstance(cls, type) or not issubclass(cls, Config):
            continue
        family = family_name(cls)
        if family is not None:
            return variant(family, tag)
        if tag_of(cls) in (None, tag):
            return cls
    return None


def choices(annotation: Any) -> dict[str, type[Config]]:
    """``type`` tag -> config class of everything a field takes by tag; empty when it takes none."""
    found: dict[str, type[Config]] = {}
    for cls in members(annotation):
        if isinstance(cls, type) and issubclass(cls, Config):
            family = family_name(cls)
            tag = tag_of(cls)
            if family is not None:
                found |= variants(family)
            elif tag is not None:
                found[tag] = cls
    return found


def _element(annotation: Any, key: str | int) -> Any:
    """Annotation of an entry of a table or list."""
    for candidate in members(annotation):
        origin, arguments = get_origin(candidate), get_args(candidate)
        if origin is tuple and isinstance(key, int):
            return arguments[0] if arguments[1:] == (...,) else arguments[min(key, len(arguments) - 1)]
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(key, str):
            return arguments[1]
    return None


def annotation_at(root: type[Config], path: Path, data: Any) -> Any:
    """The annotation of what is at ``path`` below a ``root`` config, or None when no field is there.

    Args:
        root: class of the whole config.
        path: where to look.
        data: the whole config as plain data: its ``type`` tags choose among variants.
    """
    annotation: Any = root
    for key in path:
        cls = config_class(annotation, data)
        if cls is not None:
            info = cls.model_fields.get(str(key))
            annotation = info.annotation if info is not None else None
        else:
            annotation = _element(annotation, key)
        if annotation is None:
            return None
        data = entry(data, key)
    return annotation


def class_at(root: type[Config], path: Path, data: Any) -> type[Config] | None:
    """The config class at ``path``, or None; arguments as of `annotation_at`."""
    annotation = annotation_at(root, path, data)
    for key in path:
        data = entry(data, key)
    return None if annotation is None else config_class(annotation, data)
