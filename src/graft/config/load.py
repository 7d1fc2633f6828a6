"""From a config file (and overrides) to a validated `Experiment`, with every problem in one report."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, cast

from pydantic import ValidationError

from graft.config.base import DEFER_PROBLEMS, Config
from graft.config.experiment import Experiment
from graft.config.explain import Issue, explain
from graft.config.fields import config_class
from graft.config.includes import find_config, read_with_bases
from graft.config.overrides import apply_overrides
from graft.config.registry import load_plugins, make_importable
from graft.config.report import ConfigProblems
from graft.config.tree import Located, Node, Path, Place, entry, from_plain
from graft.errors import ConfigError


def load_experiment(path: str | FilePath, overrides: Sequence[str] = ()) -> Experiment:
    """Reads, merges and validates a config.

    Args:
        path: YAML, JSON or TOML file; ``presets/…`` also finds graft's own. Its folder and the working directory become
            importable for ``plugins`` (they come last, so they shadow nothing).
        overrides: ``path.to.field=value`` each, applied in order (`graft.config.overrides`).

    Raises:
        ConfigProblems: one report of everything that is wrong, each with file, line and column.
    """
    document = read_with_bases(path)
    root, problems = apply_overrides(document.root, overrides)
    folder = find_config(str(path), FilePath()).resolve().parent
    return _validated(root, [*document.problems, *problems], (folder, FilePath.cwd()))


def load_experiment_from_dict(
    data: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "config"
) -> Experiment:
    """The same for plain data; ``where`` is what messages call it.

    Raises:
        ConfigProblems: one report of everything that is wrong.
    """
    root, problems = apply_overrides(from_plain(data, Place(where)), overrides)
    return _validated(root, problems, (FilePath.cwd(),))


def _validated(root: Node, problems: list[Located], folders: Sequence[FilePath]) -> Experiment:
    problems = [*problems, *_load_plugins(root, folders)]
    data = root.plain()
    issues, experiment = _issues(data)
    known = [problem.path for problem in problems if problem.path]
    for issue in issues:
        if not any(issue.path[: len(path)] == path for path in known):  # the cause was reported already
            problems.append(Located(_place(root, issue), issue.path, issue.problem, issue.fix))
    if problems:
        raise ConfigProblems(problems)
    assert experiment is not None
    return experiment


def _place(root: Node, issue: Issue) -> Place:
    node, rest = root.find(issue.path)
    if rest or issue.kind.startswith("unknown") or isinstance(node.value, dict | list):
        return node.key_position()
    return node.place


def _load_plugins(root: Node, folders: Sequence[FilePath]) -> list[Located]:
    """Imports the plug-ins the config names (validation has to know their variants); returns what failed."""
    node = root.child("plugins")
    if node is None or not isinstance(node.value, list):
        return []  # validation says what is wrong with it
    problems: list[Located] = []
    if node.value:
        make_importable(*folders)
    for i, item in enumerate(node.value):
        if isinstance(item.value, str):
            try:
                load_plugins((item.value,))
            except ConfigError as error:
                problems.append(Located(item.place, ("plugins", i), error.problem, error.fix))
    return problems


def _issues(data: Any) -> tuple[list[Issue], Experiment | None]:
    """Everything wrong with ``data``, and the experiment when nothing is.

    Cross-field rules need a whole config. When fields are wrong, the rules are checked on a repaired copy (what was
    probably meant, else the default), and what they say about a repaired field is left out.
    """
    issues, experiment = _decode(data)
    if experiment is not None and not issues:
        return [], experiment
    if experiment is None:
        repaired, touched = _repair(data, issues)
        again, experiment = _decode(repaired)
        if experiment is None:
            again = _section_issues(repaired)
        issues += [i for i in again if i.kind == "physics" and not _about(i, touched)]
    return issues, None


def _decode(data: Any) -> tuple[list[Issue], Experiment | None]:
    try:
        experiment = Experiment.model_validate(data, context={DEFER_PROBLEMS: True})
    except ValidationError as error:
        return explain(error, Experiment, data), None
    return _physics(experiment), experiment


def _physics(config: Config, path: Path = ()) -> list[Issue]:
    return [Issue((*path, *p.path), p.message, p.fix, "physics") for p in config.all_problems()]


def _section_issues(data: Any) -> list[Issue]:
    """Cross-field problems inside the sections (model, training, …) that can be decoded without the others."""
    issues: list[Issue] = []
    for name, info in Experiment.model_fields.items():
        section = entry(data, name)
        cls = config_class(info.annotation, section)
        if cls is not None and isinstance(section, dict):
            with contextlib.suppress(ValidationError):  # reported already, as part of the whole
                issues += _physics(cls.model_validate(section, context={DEFER_PROBLEMS: True}), (name,))
    return issues


def _repair(data: Any, issues: Sequence[Issue]) -> tuple[Any, set[Path]]:
    """A copy of ``data`` with wrong keys and values replaced by what was probably meant, or dropped; and where."""
    copied = copy.deepcopy(data)
    touched: set[Path] = set()
    for issue in issues:
        found = copied
        for key in issue.path[:-1]:
            found = entry(found, key)
        if not isinstance(found, dict) or not issue.path or issue.path[-1] not in found:
            continue
        table = cast(dict[str | int, Any], found)
        value = table.pop(issue.path[-1])
        if issue.rename is not None and issue.rename not in table:
            table[issue.rename] = value
            continue
        if issue.replacement is not None:
            table[issue.path[-1]] = issue.replacement
        touched.add(issue.path)
    return copied, touched


def _about(issue: Issue, touched: set[Path]) -> bool:
    """Whether a problem may be the work of the repair: it is about a repaired field, or speaks of one."""
    return any(
        issue.path[: len(path)] == path
        or (path[-1] != "type" and re.search(rf"\b{re.escape(str(path[-1]))}\b", issue.problem))
        for path in touched
    )
