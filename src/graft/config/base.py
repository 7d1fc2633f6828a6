"""The base of every configuration object: frozen, strict, and able to report all of its problems at once.

No torch here: a config is checked, merged, hashed and documented without importing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Never, Self, cast

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError

PROBLEMS_ERROR = "graft_problems"
"""pydantic error type whose ``ctx['problems']`` lists `Problem`s, each with a path relative to the error's ``loc``."""


DEFER_PROBLEMS = "defer_problems"
"""Validation context ``{DEFER_PROBLEMS: True}``: cross-field problems are not raised, so that a caller can collect
those of the whole tree with `Config.all_problems`. The result is not to be used before that."""


@dataclass(frozen=True)
class Problem:
    """One cross-field problem.

    Args:
        path: location relative to the config that reports it, e.g. ``("min_lr_ratio",)``.
        message: what is wrong, with the values involved.
        fix: what to do, or None.
    """

    path: tuple[str | int, ...]
    message: str
    fix: str | None = None


def knob(
    default: Any = ...,
    doc: str = "",
    *,
    only_if: Mapping[str, Any] | None = None,
    factory: Any = None,
    **constraints: Any,
) -> Any:
    """A documented config field.

    Args:
        default: the default value; ``...`` makes the field required.
        doc: one line with unit, range and the reason of the default (shown by ``graft parts`` and in the JSON Schema).
        only_if: conditions ``{other_field: value}`` under which the field acts. A value may be a tuple of allowed
            values, or the sentinel `SET` (the other field is neither None nor False). Setting the field to anything
            but its default while a condition fails is an error: a knob that does nothing is never silent.
        factory: builds a mutable or computed default instead of ``default``.
        constraints: pydantic constraints (``gt``, ``ge``, ``lt``, ``le``, ``min_length``, …).
    """
    kwargs: dict[str, Any] = {"description": doc, **constraints}
    info = Field(default_factory=factory, **kwargs) if factory is not None else Field(default, **kwargs)
    if only_if:
        info.metadata.append(OnlyIf(dict(only_if)))
    return info


class _Set:
    def __repr__(self) -> str:
        return "set"


SET = _Set()
"""Condition of ``knob(only_if=…)``: the other field is neither None nor False."""


@dataclass(frozen=True)
class OnlyIf:
    """Conditions under which a field acts; see `knob`."""

    conditions: dict[str, Any]

    def describe(self) -> str:
        """The conditions in words: ``router is 'topk' and loops is set``."""
        return " and ".join(f"{name} is {self._words(wanted)}" for name, wanted in self.conditions.items())

    @staticmethod
    def _words(wanted: Any) -> str:
        if wanted is SET:
            return "set"
        allowed = cast(tuple[Any, ...], wanted if isinstance(wanted, tuple) else (wanted,))
        return " or ".join(repr(value) for value in allowed)

    def unmet(self, config: BaseModel) -> str | None:
        """The first condition that fails, in words, or None."""
        for name, wanted in self.conditions.items():
            actual = getattr(config, name)
            if wanted is SET:
                met = actual is not None and actual is not False
            else:
                met = actual in (wanted if isinstance(wanted, tuple) else (wanted,))
            if not met:
                return f"{name} is {self._words(wanted)} (it is {actual!r})"
        return None


def freeze(value: Any) -> Any:
    """Plain data with every list turned into a tuple (strict mode accepts no list for a tuple field)."""
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in cast(Sequence[Any], value))
    if isinstance(value, dict):
        return {k: freeze(v) for k, v in cast(dict[Any, Any], value).items()}
    return value


class FrozenDict(dict[Any, Any]):
    """A dict that refuses changes and can be hashed: what the tables inside a config are."""

    def _refuse(self, *args: object, **kwargs: object) -> Never:
        raise TypeError("a config is frozen: make a changed copy with replace()")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse  # pyright: ignore[reportAssignmentType]

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[Any, Any]]]:
        return FrozenDict, (dict(self),)  # pickle and copy would otherwise fill an empty one


def frozen_tables(value: Any) -> Any:
    """``value`` with every plain dict in it, at any depth of dicts and tuples, turned into a `FrozenDict`."""
    if isinstance(value, dict):
        return FrozenDict((k, frozen_tables(v)) for k, v in cast(dict[Any, Any], value).items())
    if isinstance(value, tuple):
        return tuple(frozen_tables(v) for v in cast(tuple[Any, ...], value))
    return value


class Config(BaseModel):
    """Frozen, strict, closed configuration object. Subclasses add fields with `knob` and physics with `problems`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
        protected_namespaces=(),
        use_attribute_docstrings=False,
    )

    removable: ClassVar[tuple[str, ...]] = ()
    """Tables in which an entry set to null is no entry: how a config drops one that its base has."""

    @model_validator(mode="before")
    @classmethod
    def _freeze_lists(cls, data: Any) -> Any:
        frozen = freeze(data)
        if cls.removable and isinstance(frozen, dict):
            table = cast(dict[str, Any], frozen)
            for name in cls.removable:
                if isinstance(entries := table.get(name), dict):
                    table[name] = {k: v for k, v in cast(dict[str, Any], entries).items() if v is not None}
            return table
        return frozen

    @model_validator(mode="after")
    def _report_problems(self, info: ValidationInfo) -> Self:
        for name, value in list(self.__dict__.items()):
            if isinstance(value, dict | tuple):  # pydantic makes dicts of its own, so they are frozen only here
                object.__setattr__(self, name, frozen_tables(value))
        if info.context is not None and info.context.get(DEFER_PROBLEMS):
            return self
        found = self.own_problems()
        if found:
            text = "; ".join(p.message for p in found)
            raise PydanticCustomError(PROBLEMS_ERROR, "{text}", {"text": text, "problems": found})
        return self

    def problems(self) -> Iterator[Problem]:
        """Cross-field physics owned by this config: yields every `Problem`. Override; the default yields none."""
        yield from ()

    def own_problems(self) -> list[Problem]:
        """Dead knobs and cross-field problems of this config alone, not of the configs inside it."""
        return [*self._dead_knobs(), *self.problems()]

    def all_problems(self) -> list[Problem]:
        """Problems of this config and of every config inside it, with paths from here; the insides first."""
        found: list[Problem] = []
        for path, config in sub_configs(self.__dict__):
            found += [Problem((*path, *p.path), p.message, p.fix) for p in config.all_problems()]
        try:
            found += self.own_problems()
        except Exception:
            if not found:  # `problems` may rely on valid insides: only then is its failure our bug
                raise
        return found

    def _dead_knobs(self) -> Iterator[Problem]:
        for name in sorted(self.model_fields_set):
            info: FieldInfo = type(self).model_fields[name]
            for rule in (m for m in info.metadata if isinstance(m, OnlyIf)):
                unmet = rule.unmet(self)
                if unmet and getattr(self, name) != info.get_default(call_default_factory=True):
                    yield Problem(
                        (name,),
                        f"{name} does nothing here: it acts only if {unmet}",
                        fix=f"remove {name}, or change what it depends on",
                    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        from graft.config.schema import complete  # which needs the whole tree of configs

        schema = handler(core_schema)
        complete(handler.resolve_ref_schema(schema), cls)
        return schema

    def to_dict(self) -> dict[str, Any]:
        """Plain data (lists, dicts, scalars) with every default written out; `type(self)` decodes it back.

        Fields keep their order, except that ``type`` comes first.
        """
        return _type_first(self.model_dump(mode="json"))

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed. Raises pydantic's ValidationError when the result is not valid."""
        data = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**data, **changes})


def _type_first(value: Any) -> Any:
    if isinstance(value, list):
        return [_type_first(v) for v in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    table = cast(dict[str, Any], value)
    head = ["type"] if "type" in table else []
    return {key: _type_first(table[key]) for key in [*head, *(k for k in table if k != "type")]}


def sub_configs(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Config]]:
    """The configs directly inside ``value`` (a config's fields, or a table or tuple of them), each with its path."""
    if isinstance(value, Config):
        yield path, value
    elif isinstance(value, dict):
        for key, below in cast(dict[str, Any], value).items():
            yield from sub_configs(below, (*path, key))
    elif isinstance(value, tuple):
        for i, below in enumerate(cast(tuple[Any, ...], value)):
            yield from sub_configs(below, (*path, i))
