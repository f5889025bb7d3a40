"""Plots of bars and lines as SVG text, without another package.

Colours come from the CSS variables `--text`, `--faint` and `--bar` of the page, or from defaults that are legible on white and on black.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

COLOURS = ("#2f78b7", "#e08a1e", "#2a9d6f", "#c8503c", "#8d63b0", "#8a6d5a", "#d16ba5", "#6f7780", "#a5a32b", "#27a9b8")
TEXT, FAINT, BAR = "var(--text, #7a7f85)", "var(--faint, #bbb)", "var(--bar, #2f78b7)"
SMALLEST, LARGEST = 1e-300, 1e300  # beyond these, ticks would leave the range of float64
NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Bar(NamedTuple):
    """One bar.

    Attributes:
        label: text in front of the bar.
        value: its length.
        text: the value as shown behind the bar.
        colour: a CSS colour.
    """

    label: str
    value: float
    text: str
    colour: str = BAR


class Point(NamedTuple):
    """One point of a line.

    Attributes:
        x: horizontal place.
        y: vertical place.
        text: shown while the mouse rests on the point.
    """

    x: float
    y: float
    text: str


def bars(rows: Sequence[Bar], width: int = 640) -> str:
    """Return SVG of horizontal bars from zero, one in each row. Infinity fills its row; NaN and negative values have no length."""
    left = 14 + 7 * max((len(row.label) for row in rows), default=0)
    right = 14 + 7 * max((len(row.text) for row in rows), default=0)
    most = max((row.value for row in rows if math.isfinite(row.value)), default=0)
    most = most if most > 0 else 1
    svg = _svg(width, 26 * len(rows))
    for i, row in enumerate(rows):
        share = min(row.value / most, 1) if row.value > 0 else 0  # False for NaN
        length = max(1.0, share * (width - left - right))
        y = 26 * i
        _text(svg, left - 8, y + 17, row.label, "end")
        _add(svg, "rect", x=left, y=y + 4, width=f"{length:.1f}", height=18, rx=2, fill=row.colour)
        _text(svg, f"{left + length + 6:.1f}", y + 17, row.text)
    return _as_text(svg)


def lines(series: Mapping[str, Sequence[Point]], *, x_label: str, log: bool = False, width: int = 960, height: int = 300) -> str:
    """Return SVG of each series as a line with dots, and of a legend; empty if no point can be drawn.

    Points without a place are left out: NaN, values above 1e300 or below zero, and zero on a logarithmic scale.
    """
    shown = {name: list(drawable(points, log=log)) for name, points in series.items()}
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

    svg = _svg(width, max(height, top + 18 * len(shown) + 8))
    for tick in ticks:
        y = at(Point(first, tick, ""))[1]
        ends = {"x1": left, "x2": right, "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        _add(svg, "line", **ends, stroke=FAINT, stroke_width=0.6)
        _text(svg, left - 6, f"{y + 4:.1f}", f"{tick:g}", "end")
    step = max(1, math.ceil((last - first) / 16))
    for mark in range(math.ceil(first), math.floor(last) + 1, step):
        _text(svg, f"{at(Point(mark, ticks[0], ''))[0]:.1f}", bottom + 17, str(mark), "middle")
    _text(svg, (left + right) / 2, height - 5, x_label, "middle")
    for i, (name, line) in enumerate(shown.items()):
        colour, places = COLOURS[i % len(COLOURS)], [at(point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        _add(svg, "polyline", points=path, fill="none", stroke=colour, stroke_width=1.5)
        for (x, y), point in zip(places, line, strict=True):
            dot = _add(svg, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, fill=colour)
            _add(dot, "title").text = _printable(point.text)
        _add(svg, "circle", cx=right + 18, cy=top + 8 + 18 * i, r=4, fill=colour)
        _text(svg, right + 28, top + 12 + 18 * i, name)
    return _as_text(svg)


def drawable(points: Iterable[Point], *, log: bool) -> Iterable[Point]:
    """Yield the points that have a place on the scale."""
    least = SMALLEST if log else 0
    return (point for point in points if least <= point.y <= LARGEST)


def _ticks(most: float) -> list[float]:
    """Return round steps from zero to at least `most`."""
    if most < SMALLEST:
        return [0.0, 1.0]
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _log_ticks(points: Sequence[Point]) -> list[float]:
    """Return 1, 2 and 5 times powers of ten around all points, or the powers alone if the points span many."""
    low, high = min(point.y for point in points), max(point.y for point in points)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    below = [tick for tick in ticks if tick <= low][-1:]
    above = [tick for tick in ticks if tick >= high][:1]
    return below + [tick for tick in ticks if low < tick < high] + above


def _svg(width: int, height: int) -> ElementTree.Element:
    box = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    return ElementTree.Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", **box, "font-family": "system-ui, sans-serif", "font-size": "12"}
    )


def _add(parent: ElementTree.Element, tag: str, **attributes: object) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {name.replace("_", "-"): str(value) for name, value in attributes.items()})


def _text(svg: ElementTree.Element, x: object, y: object, text: str, anchor: str = "start") -> None:
    _add(svg, "text", x=x, y=y, text_anchor=anchor, fill=TEXT).text = _printable(text)


def _printable(text: str) -> str:
    """Return the text with the characters that XML cannot hold replaced."""
    return NOT_XML.sub("\ufffd", text)


def _as_text(svg: ElementTree.Element) -> str:
    ElementTree.indent(svg, "")
    return ElementTree.tostring(svg, encoding="unicode")
