"""What variants exist and what their fields mean, for people (``graft parts``)."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from graft.config.base import Config, OnlyIf
from graft.config.fields import family_name, tag_of
from graft.config.registry import PACKAGES, family_of, variants

KINDS: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}


@dataclass(frozen=True)
class FieldDoc:
    """One field of a variant.

    Args:
        name: its key.
        type: what it takes, in words.
        required: whether it has no default.
        default: the default as plain data; None also when required.
        range: bounds in words, or None.
        only_if: when it acts, in words; None = always.
        doc: meaning, unit, reason of the default.
    """

    name: str
    type: str
    required: bool
    default: Any
    range: str | None
    only_if: str | None
    doc: str


@dataclass(frozen=True)
class VariantDoc:
    """One variant: its family, its ``type`` tag, what it is, and its fields."""

    family: str
    type: str
    doc: str
    fields: tuple[FieldDoc, ...]

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.doc.splitlines()[0] if self.doc else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def describe(cls: type[Config]) -> VariantDoc:
    """The documentation of a variant's config class."""
    doc = "\n".join(line.strip() for line in (cls.__doc__ or "").strip().splitlines())
    fields = tuple(_field(name, info) for name, info in cls.model_fields.items() if name != "type")
    return VariantDoc(family_of(cls), tag_of(cls) or "", doc, fields)


def all_variants() -> list[VariantDoc]:
    """Every registered variant, family by family."""
    return [describe(cls) for family in PACKAGES for cls in variants(family).values()]


def matching(name: str) -> list[VariantDoc]:
    """The variants of a family, or those whose tag is ``name``, or the one named ``family.tag``."""
    return [v for v in all_variants() if name in (v.family, v.type, f"{v.family}.{v.type}")]


def _field(name: str, info: FieldInfo) -> FieldDoc:
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    conditions = [rule.describe() for rule in info.metadata if isinstance(rule, OnlyIf)]
    return FieldDoc(
        name=name,
        type=type_words(info.annotation),
        required=info.is_required(),
        default=default.to_dict() if isinstance(default, Config) else default,
        range=_range(info.metadata),
        only_if=" and ".join(conditions) or None,
        doc=info.description or "",
    )


def type_words(annotation: Any) -> str:
    """What a field takes: ``whole number or null``, ``list of text``, ``norm``, ``silu | gelu``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation in KINDS:
        return KINDS[annotation]
    if origin is Annotated:
        return type_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(a) for a in arguments))
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {type_words(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_words(a) for a in arguments)}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"table of {type_words(arguments[1])}"
    assert isinstance(annotation, type), annotation
    assert issubclass(annotation, Config), annotation
    return family_name(annotation) or tag_of(annotation) or "table"


def plain_value(value: Any) -> str:
    """A default or setting on one line, as it would be written in a config."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _range(metadata: list[Any]) -> str | None:
    bounds: list[str] = []
    for rule in metadata:
        match rule:
            case annotated_types.Gt(gt=bound):
                bounds.append(f"> {bound}")
            case annotated_types.Ge(ge=bound):
                bounds.append(f">= {bound}")
            case annotated_types.Lt(lt=bound):
                bounds.append(f"< {bound}")
            case annotated_types.Le(le=bound):
                bounds.append(f"<= {bound}")
            case annotated_types.MinLen(min_length=bound):
                bounds.append(f"at least {bound} entries")
            case _:
                pass
    return ", ".join(bounds) or None
