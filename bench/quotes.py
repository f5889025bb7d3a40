"""Figures that a document quotes from the tables in `bench/results`.

A quoted figure is a Markdown link to the table, whose title names the row:

    Generation is [1.27 times](bench/results/x.md "SmolLM2-135M: generate()") as fast.

The title is the first cell of a row, and `Heading > first cell` where several tables have such a row. Each number in the link's text must
stand in that row, rounded to as many digits as the quotation has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LINK = re.compile(r'\[([^\[\]]*)\]\(([^()\s]*bench/results/[^()\s]+\.md)\s+"([^"]*)"\)')
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\d)")


@dataclass(frozen=True)
class Quote:
    """A figure in a document.

    Attributes:
        text: The words of the link, which hold the numbers.
        table: Path of the table from the document's folder.
        row: First cell of the row, possibly with its heading.
    """

    text: str
    table: str
    row: str


def quotes(document: str) -> list[Quote]:
    """Return the quoted figures of a Markdown document, in order."""
    return [Quote(" ".join(text.split()), table, " ".join(row.split())) for text, table, row in _LINK.findall(document)]


def check_quote(quote: Quote, folder: Path) -> None:
    """Raise if the table does not hold the figure; `folder` is the document's.

    Raises:
        ValueError: The table or the row does not exist, several rows match, or a number is not in the row.
    """
    path = folder / quote.table
    if not path.is_file():
        raise ValueError(f"{quote.text}: expected a table at {quote.table}, there is none")
    rows = [row for name, row in _rows(path.read_text(encoding="utf-8")) if quote.row in (name, name.partition(" > ")[2])]
    if len(rows) != 1:
        raise ValueError(f"{quote.text}: expected one row {quote.row!r} in {quote.table}, got {len(rows)}")
    quoted = _NUMBER.findall(quote.text)
    if not quoted:
        raise ValueError(f"{quote.text}: expected a number in the link's text")
    held = [_value(number) for cell in rows[0] for number in _NUMBER.findall(cell)]
    for number in quoted:
        half_a_digit = 0.5001 * 10 ** -len(number.partition(".")[2])
        if all(abs(value - _value(number)) > half_a_digit for value in held):
            raise ValueError(
                f"{quote.text}: expected {number} in the row {quote.row!r} of {quote.table}, got {' | '.join(rows[0])}"
            )


def _rows(page: str) -> list[tuple[str, list[str]]]:
    """Return each table row's name, `Heading > first cell`, and its other cells."""
    heading, found = "", []
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        elif line.startswith("|"):
            first, *others = (cell.strip() for cell in line.strip().strip("|").split("|"))
            found.append((f"{heading} > {first}", others))
    return found


def _value(number: str) -> float:
    return float(number.replace(",", ""))
