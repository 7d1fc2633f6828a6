"""The error that carries every problem of a config at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graft.config.tree import Located, Place
from graft.errors import ConfigError


class ConfigProblems(ConfigError):
    """Everything that is wrong with a config, one line each, in the order of the file.

    Args:
        problems: at least one problem; shown sorted by place, overrides last, each line once.
    """

    def __init__(self, problems: Iterable[Located]):
        self.problems = in_order(problems)
        assert self.problems, "an error needs a problem"
        super().__init__("\n".join(map(str, self.problems)))

    def render(self) -> str:
        """One problem on one line; several under a line that counts them."""
        if len(self.problems) == 1:
            return self.problem
        return f"{len(self.problems)} problems in the config\n{self.problem}"

    def to_json(self) -> list[dict[str, Any]]:
        """One ``{file, line, col, path, problem, fix}`` per problem."""
        return [problem.to_dict() for problem in self.problems]


def in_order(problems: Iterable[Located]) -> list[Located]:
    """Sorted by place: each file's lines in order, what has no line (overrides) last; doubles removed."""

    def key(problem: Located) -> tuple[bool, str, int, int, str]:
        place = problem.place
        return place.line is None, place.file, place.line or 0, place.col or 0, str(problem)

    return sorted(dict.fromkeys(problems), key=key)


def one_problem(file: str, problem: str, fix: str | None = None, *, line: int | None = None, col: int | None = None):
    """The error for a file that cannot be read at all."""
    return ConfigProblems([Located(Place(file, line, col), (), problem, fix)])
