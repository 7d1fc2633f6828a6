"""What is chosen, on the page of a run."""

from __future__ import annotations

import re
from typing import Any

from graft.report.charts import line_chart
from graft.report.usage import usage_section


def line(step: int, layer: int, **fields: Any) -> dict[str, Any]:
    figures = {"items": 8, "chosen": 10, "coverage": 0.5, "entropy": 0.25, "gini": 0.125, "hot": 1, "dead": 2}
    return {"kind": "usage", "of": f"layers.{layer}.moe.experts", "step": step, **figures, **fields}


def test_nothing_without_lines() -> None:
    assert usage_section([{"kind": "train", "step": 1, "coverage": 1.0}]) == ""


def test_a_line_per_layer_and_the_newest_figures() -> None:
    lines = [line(step, layer, coverage=step / 10, dead=step) for step in (2, 4, 6) for layer in (0, 1)]
    lines.append({"kind": "train", "step": 6, "loss": 1.0})
    lines.append(line(8, 1, coverage=None, entropy=None, gini=None, hot=None, dead=1234))
    section = usage_section(lines)
    drawn = re.findall(r'points="([^"]+)"', section)
    assert [len(points.split()) for points in drawn] == [3, 3, 3, 3], "two charts with a line for each layer"
    heights = [float(point.split(",")[1]) for point in drawn[0].split()]
    assert heights == sorted(heights, reverse=True), "coverage grows"
    rows = re.findall(r"<tr>(.*?)</tr>", section)
    assert rows[1] == "<td>layers.0.moe.experts</td>" + "".join(
        f"<td>{v}</td>" for v in ("8", "0.600", "0.250", "0.125", "1", "6")
    )
    assert rows[2].endswith("<td>–</td><td>–</td><td>–</td><td>–</td><td>1,234</td>")


def test_names_are_text() -> None:
    assert "&lt;b&gt;" in usage_section([{**line(1, 0), "of": "<b>"}])
    assert "<b>" not in usage_section([{**line(1, 0), "of": "<b>"}])


def test_every_layer_of_a_deep_model_is_drawn_in_a_colour_of_its_own() -> None:
    few = line_chart({str(i): [(0, i), (1, i)] for i in range(4)})
    many = line_chart({str(i): [(0, i), (1, i)] for i in range(7)})
    assert few.count("<polyline") == 4
    assert "--hue" not in few
    assert many.count("<polyline") == 7
    hues = re.findall(r'class="line ramp" style="--hue:(\d+)"', many)
    assert len(set(hues)) == 7
    assert hues == re.findall(r'class="key ramp" style="--hue:(\d+)"', many)
