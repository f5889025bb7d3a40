"""The page `report.html` of a report: one file without scripts, which loads nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .experts import INDEX, starred
from .plots import LARGEST, Bar, Point, bars, lines

if TYPE_CHECKING:
    from jinja2 import Template

BEFORE = "var(--before, #9aa4ae)"


class Section(NamedTuple):
    """A heading with a plot and a note.

    Attributes:
        title: the heading.
        plot: SVG; empty for none.
        note: text below the plot; empty for none.
    """

    title: str
    plot: str = ""
    note: str = ""


class Table(NamedTuple):
    """A table that is folded away below the plots.

    Attributes:
        summary: the line that unfolds it.
        columns: the heads of the columns.
        rows: the text of each cell, row by row.
    """

    summary: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """The content of the page of any report.

    Attributes:
        facts: label and value of each number in the headline.
        sections: the plots.
        table: the table below them.
        command: the command line that started the run; None where Python called it.
        versions: versions of the packages, and the device and threads.
        more: further tables.
    """

    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    table: Table
    command: str | None
    versions: Mapping[str, object]
    more: list[Table] = []


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("sparsekern.reports", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2")


def render(page: Page) -> str:
    """Return the page as HTML. All text is escaped, and a section without plot and note is left out."""
    sections = [section for section in page.sections if section.plot or section.note]
    return _template().render(page._replace(sections=sections)._asdict())


def table(summary: str, rows: Iterable[object], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """Return a table of `rows`.

    Args:
        summary: the line that unfolds it.
        rows: the objects to show.
        columns: by head, a function that returns the text of a row's cell.
    """
    return Table(summary, list(columns), [[text(row) for text in columns.values()] for row in rows])


def shown(value: float | None, form: str) -> str:
    """Return a number in the given format, or a dash for None."""
    return "–" if value is None else format(value, form)


def perplexity_section(measured: Mapping[str, object]) -> Section:
    """Return bars of the perplexities before and after pruning, if they were measured."""
    rows = [
        Bar(label, value, f"{value:.4g}", *colour)
        for label, colour in (("dense", [BEFORE]), ("pruned", []))
        if isinstance(value := measured.get(f"perplexity, {label}"), (int, float))
    ]
    note = f"{measured['evaluated on']}; lower is better." if rows and "evaluated on" in measured else ""
    return Section("Perplexity", bars(rows) if rows else "", note)


def size_section(size: Mapping[str, int]) -> Section:
    """Return bars of the sizes in memory and on disk, if the model was saved."""
    if not size:
        return Section("Size")
    dense, saved = size["dense"], size["saved"]
    rows = [Bar("dense weights", dense, f"{dense / 1e6:,.1f} MB", BEFORE)]
    rows.append(Bar("saved files", saved, f"{saved / 1e6:,.1f} MB ({saved / max(1, dense):.0%})"))
    return Section("Size", bars(rows))


def seconds_section(title: str, seconds: Mapping[str, float]) -> Section:
    """Return bars of the seconds of each phase, without their total."""
    rows = [Bar(phase, taken, f"{taken:.1f} s") for phase, taken in seconds.items() if phase != "total"]
    return Section(title, bars(rows) if rows else "")


def lines_section(title: str, series: Mapping[str, Sequence[Point]], *, x_label: str, note: str = "", log: bool = False) -> Section:
    """Return a plot of the series. The note names points that are NaN or infinite, which the plot leaves out."""
    missing = [point.text for points in series.values() for point in points if not point.y <= LARGEST]
    plot = lines(series, x_label=x_label, log=log)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        note = f"{note} Not drawn: {'; '.join(missing[:3])}{more}.".strip()
    return Section(title, plot, note if plot or missing else "")


def by_block(layers: Iterable[tuple[str, float | None]], form: str) -> dict[str, list[Point]]:
    """Return one series for all layers whose names are equal behind the index of their block. Of many experts it is the mean.

    Args:
        layers: name and value of each layer. A layer with the value None has no point.
        form: the format of the values.
    """
    known = [(position, name, value) for position, (name, value) in enumerate(layers) if value is not None]
    stars = starred(name for _, name, _ in known)
    alike: dict[tuple[int, str], list[float]] = {}
    first: dict[str, int] = {}
    for position, name, value in known:
        place = position if stars[name] == name else first.setdefault(stars[name], position)
        alike.setdefault((place, stars[name]), []).append(value)
    series: dict[str, list[Point]] = {}
    for (position, name), found in alike.items():
        value = sum(found) / len(found)
        index = INDEX.search(name)
        label = name[index.end() :] if index else name
        x = int(index[1]) if index else position
        series.setdefault(label or name, []).append(Point(x, value, f"{name}: {value:{form}}"))
    return series
