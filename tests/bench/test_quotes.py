"""Figures that documents quote from the tables of results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.quotes import Quote, check_quote, quotes

ROOT = Path(__file__).resolve().parents[2]
TABLE = """# A CPU

## packed

| what | goal | reached | measured |
|---|---|---|---|
| model, 50 %: generate() | >= 1.25x | 1.27x (27.5 tokens/s) | 2026-11-22, abc |
| model, 50 %: size | | 1,096.5 MB | 2026-11-22, abc |
| both | | 1 | |

## other

| what | reached |
|---|---|
| both | 2 |
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "cpu.md").write_text(TABLE)
    return tmp_path


def quote(text: str, row: str = "model, 50 %: generate()") -> Quote:
    return Quote(text, "bench/results/cpu.md", row)


def test_quotes_are_found_and_other_links_are_not():
    found = quotes(
        'It is [1.27\ntimes](bench/results/cpu.md "model, 50 %: generate()") as fast as [dense](bench/results/cpu.md), '
        '[see](docs/x.md "title") and [0.56](../bench/results/cpu.md "size").'
    )
    assert found == [quote("1.27 times"), Quote("0.56", "../bench/results/cpu.md", "size")]


@pytest.mark.parametrize(
    "given",
    [
        quote("1.27 times"), quote("1.3x, 27.5 tokens/s"), quote("1.27x, with a goal of 1.25"), quote("1,096.5", "model, 50 %: size"),
        quote("1097 MB", "packed > model, 50 %: size"), quote("2", "other > both"), quote("1", "packed > both"),
    ],
)  # fmt: skip
def test_a_figure_of_its_row_passes(folder, given):
    check_quote(given, folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            quote("1.14 times"),
            "1.14 times: expected 1.14 in the row 'model, 50 %: generate()' of bench/results/cpu.md, got >= 1.25x |",
        ),
        (quote("1.270 times and 1.14"), "expected 1.14 in the row"),
        (quote("1.1 times"), "expected 1.1 in the row"),
        (quote("7.5"), "expected 7.5 in the row"),
        (quote("096.5", "model, 50 %: size"), "expected 096.5 in the row"),
        (quote("fast"), "fast: expected a number in the link's text"),
        (quote("1", "both"), "expected one row 'both' in bench/results/cpu.md, got 2"),
        (quote("1", "neither"), "expected one row 'neither' in bench/results/cpu.md, got 0"),
        (Quote("1", "bench/results/gpu.md", "both"), "expected a table at bench/results/gpu.md, there is none"),
    ],
)
def test_any_other_figure_is_refused(folder, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_quote(given, folder)


def test_the_committed_tables_can_be_quoted():
    table = "bench/results/intel-xeon-processor-3.00ghz-cpu.md"
    check_quote(Quote("1.27 times", table, "SmolLM2-135M, 50 % by SparseGPT: generate(), one token at a time"), ROOT)
    check_quote(Quote("38.78", "bench/results/quality.md", "ALPS > 2:4"), ROOT)


@pytest.mark.parametrize(
    "document", sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=str
)
def test_every_document_quotes_what_is_in_the_tables(document):
    path = ROOT / document
    for given in quotes(path.read_text(encoding="utf-8")):
        check_quote(given, path.parent)
