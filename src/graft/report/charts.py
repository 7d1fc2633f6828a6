"""Line and bar charts as inline SVG: no scripts, no fonts, no files beside the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 18, 36
CLASSES = ("a", "b", "c", "d")
"""CSS classes of the series, in order. More series than these are painted from blue to red instead."""


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def _axes(x: tuple[float, float], y: tuple[float, float], x_label: str) -> list[str]:
    parts = []
    for tick in _ticks(*y):
        at = _place(tick, y, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(*x):
        at = _place(tick, x, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return parts


def _place(value: float, domain: tuple[float, float], start: float, end: float) -> float:
    low, high = domain
    return start + (value - low) / (high - low or 1.0) * (end - start)


def _paints(count: int) -> list[str]:
    """An element's attributes for each of ``count`` series."""
    if count <= len(CLASSES):
        return [f'class="{{}} {css}"' for css in CLASSES[:count]]
    return [f'class="{{}} ramp" style="--hue:{240 - 240 * i / (count - 1):.0f}"' for i in range(count)]


def _domain(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def line_chart(
    series: Mapping[str, Points], *, x_label: str = "step", levels: Mapping[str, float] | None = None
) -> str:
    """Lines over a common x axis, with optional horizontal levels to compare with; "" when there is nothing to draw.

    Args:
        series: name -> points in order of x. Values that are not finite are left out.
        x_label: what x counts.
        levels: name -> y of a dashed line.
    """
    finite = {n: [p for p in points if all(map(math.isfinite, p))] for n, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    levels = dict(levels or {})
    xs = [p[0] for points in finite.values() for p in points]
    x = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y = _domain([p[1] for points in finite.values() for p in points] + list(levels.values()))
    body = _axes(x, y, x_label)
    for name, level in levels.items():
        at = _place(level, y, HEIGHT - BOTTOM, TOP)
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(f'<text x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    paints = _paints(len(finite))
    for paint, points in zip(paints, finite.values(), strict=True):
        placed = " ".join(
            f"{_place(a, x, LEFT, WIDTH - RIGHT):.1f},{_place(b, y, HEIGHT - BOTTOM, TOP):.1f}" for a, b in points
        )
        body.append(f'<polyline {paint.format("line")} points="{placed}"/>')
    keys = "".join(
        f"<span {paint.format('key')}>{escape(name)}</span>" for paint, name in zip(paints, finite, strict=True)
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(body)}</svg><div class="keys">{keys}</div>'


def bar_chart(bars: Mapping[str, float], *, highlight: str, unit: str) -> str:
    """Horizontal bars from zero, largest first, one of them highlighted; "" when there are none."""
    finite = {name: value for name, value in bars.items() if math.isfinite(value)}
    if not finite:
        return ""
    longest, height = max(finite.values()), 30
    rows = []
    for i, (name, value) in enumerate(sorted(finite.items(), key=lambda item: -item[1])):
        top, length = i * height, (WIDTH - 320) * value / longest
        css = "bar a" if name == highlight else "bar other"
        rows.append(f'<text x="190" y="{top + 19}" text-anchor="end">{escape(name)}</text>')
        rows.append(f'<rect class="{css}" x="200" y="{top + 5}" width="{length:.1f}" height="{height - 10}" rx="3"/>')
        rows.append(f'<text x="{208 + length:.1f}" y="{top + 19}">{value:.4f} {escape(unit)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {len(finite) * height}" role="img">{"".join(rows)}</svg>'
