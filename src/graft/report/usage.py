"""How evenly a run's model used what it can choose from, as charts and a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from graft.report.charts import line_chart

CHARTS = {
    "coverage": "share of items chosen since the last line",
    "entropy": "entropy of the choices over its largest value",
}
"""Fields that are drawn over steps, with what they are."""

COLUMNS = ("items", "coverage", "entropy", "gini", "hot", "dead")
"""Fields of the table."""


def usage_section(lines: Iterable[Mapping[str, Any]]) -> str:
    """Charts over steps with a line per layer, and the newest figures of each; "" when the model chooses nothing.

    Args:
        lines: metric lines of any kind.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("kind") == "usage":
            by_name.setdefault(str(line["of"]), []).append(line)
    if not by_name:
        return ""
    charts = "".join(
        f"<p>{escape(field)}: {escape(meaning)}</p>{line_chart(_points(by_name, field))}"
        for field, meaning in CHARTS.items()
    )
    return charts + _table({name: found[-1] for name, found in by_name.items()})


def _points(by_name: Mapping[str, list[Mapping[str, Any]]], field: str) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(float(line["step"]), float(line[field])) for line in found if line[field] is not None]
        for name, found in by_name.items()
    }


def _table(newest: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_number(line[column])}</td>' for column in COLUMNS)}</tr>"
        for name, line in newest.items()
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
