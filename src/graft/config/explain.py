"""pydantic's validation errors in plain words, at the place they were written."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from graft.config.base import PROBLEMS_ERROR, Config, Problem
from graft.config.fields import annotation_at, choices, class_at, config_class
from graft.config.tree import ABSENT, Path, entry

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}
"""Error types that mean "a value of another kind was expected", with what that kind is called."""

BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Issue:
    """One validation error, explained.

    Args:
        path: the field it is about, in the document.
        problem: what is wrong.
        fix: what to do, or None.
        kind: "unknown key", "value", "missing", or "physics": decides how a repair treats it (`graft.config.load`).
        rename: for an unknown key, the known key it is probably meant to be.
        replacement: for a wrong value, the value it is probably meant to be.
    """

    path: Path
    problem: str
    fix: str | None = None
    kind: str = "value"
    rename: str | None = None
    replacement: Any = None


@dataclass(frozen=True)
class _Error:
    """A pydantic error whose ``loc`` was mapped onto the document."""

    path: Path
    branch: bool  # it comes from one alternative of a union, not from the field as a whole
    is_key: bool  # it is about the key itself
    type: str
    context: dict[str, Any]
    message: str
    value: Any


def explain(error: ValidationError, root: type[Config], data: Any) -> list[Issue]:
    """Every problem in a validation error.

    Args:
        error: what ``root.model_validate(data)`` raised.
        root: class of the whole config.
        data: the plain data that was validated.
    """
    raw: list[_Error] = []
    for e in error.errors(include_url=False):
        path, branch = _document_path(e["loc"], data)
        is_key = e["loc"][-1:] == ("[key]",)
        raw.append(_Error(path, branch, is_key, e["type"], dict(e.get("ctx", {})), e["msg"], e["input"]))
    deeper = [e.path for e in raw]
    fitting = {e.path for e in raw if e.type == PROBLEMS_ERROR}
    groups: dict[Path, list[_Error]] = {}
    issues: list[Issue] = []
    for e in raw:
        if e.branch and any(len(p) > len(e.path) and p[: len(e.path)] == e.path for p in deeper):
            continue  # another alternative of the union fits so far and says more
        if e.branch and e.type in {*EXPECTED, "literal_error"} and e.path in fitting:
            continue  # another one has the right shape, and a problem of its own
        if e.type in EXPECTED or (e.type == "literal_error" and not e.is_key):
            groups.setdefault(e.path, []).append(e)
        else:
            issues += _explain_one(e, root, data)
    issues += [_wrong_kind(errors, root, data) for errors in groups.values()]
    renamed = {(*issue.path[:-1], issue.rename) for issue in issues if issue.rename is not None}
    return [issue for issue in issues if issue.kind != "missing" or issue.path not in renamed]


def _document_path(loc: Sequence[str | int], data: Any) -> tuple[Path, bool]:
    """``loc`` without what is not in the document: union tags, names of union alternatives, ``[key]``.

    A missing field's name, the last element, is kept. The flag says that an alternative's name was the last.
    """
    path: list[str | int] = []
    tag_passed = False
    for i, key in enumerate(loc):
        if not tag_passed and entry(data, "type") == key:
            tag_passed = True
            continue
        below = entry(data, key)
        if below is not ABSENT:
            path.append(key)
            data, tag_passed = below, False
        elif i == len(loc) - 1:
            if isinstance(data, dict | list | tuple) and not _names_alternative(key):
                return (*path, key), False
            return tuple(path), key != "[key]"
    return tuple(path), False


def _names_alternative(key: str | int) -> bool:
    """Whether ``key`` is pydantic's name of an alternative of a union: ``str``, ``literal[…]``, ``function…[…]``."""
    return isinstance(key, str) and (key in ("str", "int", "float", "bool") or re.search(r"[\[\]()]", key) is not None)


def _explain_one(e: _Error, root: type[Config], data: Any) -> list[Issue]:
    if e.type == PROBLEMS_ERROR:
        found: list[Problem] = e.context["problems"]
        return [Issue((*e.path, *p.path), p.message, p.fix, "physics") for p in found]
    if e.type == "extra_forbidden":
        return [_unknown_key(e.path, root, data)]
    if e.type == "literal_error":  # the key of a table whose keys are a closed set
        return [_unknown_choice(e, "key")]
    if e.type == "missing":
        return [_missing(e, root, data)]
    if e.type == "union_tag_invalid":
        return [_unknown_type(e, root, data)]
    if e.type == "union_tag_not_found":
        tags = ", ".join(choices(annotation_at(root, e.path, data)))
        return [Issue(e.path, "the table has no type", f"add type: one of {tags}")]
    if e.type in BOUNDS:
        words, key = BOUNDS[e.type]
        return [Issue(e.path, f"must be {words} {shown(e.context[key])}, not {shown(e.value)}")]
    if e.type == "too_short":
        return [
            Issue(e.path, f"must have at least {e.context['min_length']} entries, not {e.context['actual_length']}")
        ]
    if e.type == "too_long":
        return [Issue(e.path, f"must have at most {e.context['max_length']} entries, not {e.context['actual_length']}")]
    if e.type == "string_pattern_mismatch":
        return [Issue(e.path, f"{shown(e.value)} is not allowed", _doc(e.path, root, data))]
    return [Issue(e.path, e.message[:1].lower() + e.message[1:])]


def _unknown_key(path: Path, root: type[Config], data: Any) -> Issue:
    key = str(path[-1])
    if ":" in key:  # in {type:mlp} YAML sees one key
        fix = f"write '{key.replace(':', ': ', 1)}', with a blank after the colon"
        return Issue(path, "unknown key", fix, "unknown key")
    cls = class_at(root, path[:-1], data)
    known = list(cls.model_fields) if cls is not None else []
    close = _closest(key, known)
    if close:
        return Issue(path, "unknown key", f"did you mean '{close}'?", "unknown key", close)
    elsewhere = [name for name, info in root.model_fields.items() if _has_field(info.annotation, key, data.get(name))]
    if elsewhere:
        fix = f"'{key}' belongs to {' or '.join(elsewhere)}"
    else:
        others = [name for name in known if name != "type"]
        fix = f"keys here: {', '.join(others)}" if others else "remove it"
    return Issue(path, "unknown key", fix, "unknown key")


def _has_field(annotation: Any, key: str, data: Any) -> bool:
    cls = config_class(annotation, data if data is not None else {})
    return cls is not None and key in cls.model_fields


def _missing(e: _Error, root: type[Config], data: Any) -> Issue:
    key = e.path[-1]
    if isinstance(key, int):
        return Issue(e.path[:-1], f"must have more than {len(e.value)} entries")
    doc = _doc(e.path, root, data)
    return Issue(e.path, "is required", f"add {key}: {doc}" if doc else f"add {key}", "missing")


def _field(path: Path, root: type[Config], data: Any) -> FieldInfo | None:
    cls = class_at(root, path[:-1], data) if path else None
    return cls.model_fields.get(str(path[-1])) if cls is not None else None


def _doc(path: Path, root: type[Config], data: Any) -> str | None:
    info = _field(path, root, data)
    return info.description if info is not None else None


def _unknown_type(e: _Error, root: type[Config], data: Any) -> Issue:
    known = list(choices(annotation_at(root, e.path, data)))
    tag = str(e.context["tag"])
    fix = _suggestion(tag, known)
    return Issue((*e.path, "type"), f"'{tag}' is no known type", fix, replacement=_closest(tag, known))


def _closest(value: Any, known: Sequence[str]) -> str | None:
    close = get_close_matches(value, known, n=1) if isinstance(value, str) else []
    return close[0] if close else None


def _suggestion(value: str, known: Sequence[str]) -> str:
    close = _closest(value, known)
    options = f"one of {', '.join(known)}" if len(known) > 1 else f"only {', '.join(known)} is allowed"
    return f"did you mean '{close}'? ({options})" if close else options


def _literals(e: _Error) -> list[str]:
    return re.findall(r"'([^']*)'", str(e.context["expected"])) or [str(e.context["expected"])]


def _unknown_choice(e: _Error, what: str) -> Issue:
    key = str(e.path[-1])
    return Issue(e.path, f"'{key}' is no known {what}", _suggestion(key, _literals(e)), f"unknown {what}")


def _wrong_kind(errors: list[_Error], root: type[Config], data: Any) -> Issue:
    """One issue from the errors of all alternatives of a field."""
    value = errors[0].value
    words: list[str] = []
    literals: list[str] = []
    for e in errors:
        if e.type == "literal_error":
            literals += _literals(e)
        else:
            words.append(EXPECTED[e.type])
    if literals:
        words.insert(0, ("one of " if len(literals) > 1 else "") + ", ".join(literals))
    problem = f"must be {' or '.join(dict.fromkeys(words))}, not {shown(value)}"
    path = errors[0].path
    fix, meant = _meant(value, words, literals, choices(annotation_at(root, path, data)))
    if value is None:
        info = _field(path, root, data)
        fix = "remove the line to get the default" if info is not None and not info.is_required() else None
    return Issue(path, problem, fix, replacement=meant)


def _meant(value: Any, words: list[str], literals: list[str], tags: Mapping[str, Any]) -> tuple[str | None, Any]:
    """What to do about a value of the wrong kind, for common mistakes; and the value that was meant, if clear."""
    if isinstance(value, str):
        return _meant_by_text(value, words, literals, tags)
    if isinstance(value, float) and "a whole number" in words and value.is_integer() and abs(value) < 2**63:
        return f"write {int(value)}", int(value)
    return None, None


def _meant_by_text(
    value: str, words: list[str], literals: list[str], tags: Mapping[str, Any]
) -> tuple[str | None, Any]:
    if literals:
        close = _closest(value, literals)
        return (f"did you mean '{close}'?", close) if close else (None, None)
    if "true or false" in words and value.lower() in ("yes", "no", "on", "off"):
        meant = value.lower() in ("yes", "on")
        return f"write {shown(meant)} (YAML 1.2 reads {value} as text)", meant
    if "a table" in words and tags:
        fix = f"write {{type: {value}}}" if value in tags else f"write {{type: …}} with one of {', '.join(tags)}"
        return fix, {"type": value} if value in tags else None
    for kind, word in ((int, "a whole number"), (float, "a number")):
        if word in words:
            with contextlib.suppress(ValueError):
                if math.isfinite(meant := kind(value)):
                    return "remove the quotes", meant
    return None, None


def shown(value: Any) -> str:
    """A value as it would be written in a config, shortened."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"'{value if len(value) <= 40 else value[:37] + '...'}'"
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else str(value)
