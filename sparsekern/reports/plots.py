"""Plots as SVG text: bars and lines, drawn by hand so that they need no other package and no other file.

Colours come from the CSS variables `--text`, `--faint` and `--bar` of the page around them, or from defaults that can be read on white and on black.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#2f78b7", "#e08a1e", "#2a9d6f", "#c8503c", "#8d63b0", "#8a6d5a", "#d16ba5", "#6f7780", "#a5a32b", "#27a9b8")
TEXT, FAINT, BAR = "var(--text, #7a7f85)", "var(--faint, #bbb)", "var(--bar, #2f78b7)"
STYLE = 'font-family="system-ui, sans-serif" font-size="12"'


class Bar(NamedTuple):
    """One bar: `text` says its value in full."""

    label: str
    value: float
    text: str
    colour: str = BAR


class Point(NamedTuple):
    """One point of a line: `text` is shown where the mouse rests on it."""

    x: float
    y: float
    text: str


def bars(rows: Sequence[Bar], width: int = 640) -> str:
    """Horizontal bars from zero, one a row."""
    left = 14 + 7 * max((len(row.label) for row in rows), default=0)
    right = 14 + 7 * max((len(row.text) for row in rows), default=0)
    most = max((row.value for row in rows), default=0) or 1
    parts = []
    for i, row in enumerate(rows):
        length = max(1.0, row.value / most * (width - left - right))
        y = 26 * i
        parts.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end" fill="{TEXT}">{escape(row.label)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{length:.1f}" height="18" rx="2" fill="{row.colour}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 17}" fill="{TEXT}">{escape(row.text)}</text>'
        )
    return _svg(width, 26 * len(rows), parts)


def lines(series: Mapping[str, Sequence[Point]], *, x_label: str, log: bool = False, width: int = 960, height: int = 300) -> str:
    """One line with dots a series, and a legend. With `log` points of zero or less are left out."""
    shown = {name: [point for point in points if point.y > 0 or not log] for name, points in series.items()}
    points = [point for line in shown.values() for point in line]
    if not points:
        return ""
    ticks = _log_ticks(points) if log else _ticks(max(point.y for point in points))
    scale = math.log10 if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    first, last = min(point.x for point in points), max(point.x for point in points)
    legend = 20 + 7 * max(map(len, shown))
    left, right, top, bottom = 62, width - legend - 16, 8, height - 40

    def at(point: Point) -> tuple[float, float]:
        x = left + 8 + (point.x - first) / ((last - first) or 1) * (right - left - 16)
        return x, bottom - (scale(point.y) - low) / ((high - low) or 1) * (bottom - top)

    parts = []
    for tick in ticks:
        y = at(Point(first, tick, ""))[1]
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}" stroke-width="0.6"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{TEXT}">{tick:g}</text>'
        )
    step = max(1, math.ceil((last - first) / 16))
    for x in range(math.ceil(first), math.floor(last) + 1, step):
        place = at(Point(x, ticks[0], ""))[0]
        parts.append(f'<text x="{place:.1f}" y="{bottom + 17}" text-anchor="middle" fill="{TEXT}">{x}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 5}" text-anchor="middle" fill="{TEXT}">{escape(x_label)}</text>')
    for i, (name, line) in enumerate(shown.items()):
        colour, places = COLOURS[i % len(COLOURS)], [at(point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for (x, y), point in zip(places, line, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{escape(point.text)}</title></circle>')
        parts.append(
            f'<circle cx="{right + 18}" cy="{top + 8 + 18 * i}" r="4" fill="{colour}"/>'
            f'<text x="{right + 28}" y="{top + 12 + 18 * i}" fill="{TEXT}">{escape(name)}</text>'
        )
    return _svg(width, max(height, top + 18 * len(shown) + 8), parts)


def _ticks(most: float) -> list[float]:
    """From zero to at least `most`, by a round step."""
    raw = (most or 1) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)] if most else [0.0, 1.0]


def _log_ticks(points: Sequence[Point]) -> list[float]:
    """1, 2 and 5 times powers of ten around all points; only the powers where those span much."""
    low, high = min(point.y for point in points), max(point.y for point in points)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    below = [tick for tick in ticks if tick <= low][-1:]
    above = [tick for tick in ticks if tick >= high][:1]
    return below + [tick for tick in ticks if low < tick < high] + above


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {STYLE}>'
    return "\n".join([start, *parts, "</svg>"])
