"""Committed figures: `bench/results/<machine>.json`, and the same rows as a table beside it.

Each row carries the provenance of its own run: date, commit, machine and versions. Recording other rows later does not change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import sparsekern
from sparsekern._files import write_atomically

from .provenance import Run, labels, provenance

FOLDER = Path(__file__).parent / "results"
FACTS = ("sparsekern", "torch", "transformers", "python")


@dataclass(frozen=True)
class Row:
    """One figure against its goal.

    Attributes:
        section: Heading of the table that it is in.
        what: Name of the benchmark, unique in its section.
        reached: The figure with its unit.
        against: The baseline and its figure.
        goal: The goal in words, empty where there is none.
        met: Whether the goal was reached; None where there is none.
        details: The numbers behind the text.
        run: Provenance of the figure; empty until it is recorded.
    """

    section: str
    what: str
    reached: str
    against: str = ""
    goal: str = ""
    met: bool | None = None
    details: dict[str, object] = field(default_factory=dict)
    run: Run = field(default_factory=dict)


def record(rows: Iterable[Row], folder: Path = FOLDER, run: Run | None = None) -> Path:
    """Write `rows` in place of those of the same name, and keep the others with their own provenance.

    Args:
        rows: What was measured.
        folder: Where the files are.
        run: Provenance of those rows that have none, from `provenance`; None is a run on this CPU now.

    Returns:
        The path of the table.
    """
    run = run or this_run()
    path = path_of(run, folder)
    merged = {(row.section, row.what): row for row in stored(path)}
    merged |= {(row.section, row.what): row if row.run else replace(row, run=run) for row in rows}
    ordered = sorted(merged.values(), key=lambda row: (row.section, row.what))
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": title_of(run), "rows": [asdict(row) for row in ordered]}
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(path.with_suffix(".md"), as_table(title_of(run), ordered).encode())
    return path.with_suffix(".md")


def path_of(run: Run, folder: Path = FOLDER) -> Path:
    """Return the file of the machine that `run` was on."""
    return folder / f"{_slug(title_of(run))}{'-cpu' if 'cpu' in run else ''}.json"


def stored(path: Path) -> list[Row]:
    """Return the rows of a file of results; none where it does not exist."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] if path.is_file() else []


def as_table(machine: str, rows: list[Row]) -> str:
    """Return the page: a table a section, with the date of each row, then what is known of each run."""
    names = labels([row.run for row in rows])
    lines = ["# " + machine]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}", "", "| what | goal | reached | met | against | measured |", "|---|---|---|---|---|---|"]
        for row in rows:
            if row.section == section:
                met = "" if row.met is None else "yes" if row.met else "**no**"
                lines.append(f"| {row.what} | {row.goal} | {row.reached} | {met} | {row.against} | {names.of(row.run)} |")
    return "\n".join([*lines, "", "## Runs (date, commit)", "", *names.described()]) + "\n"


def title_of(run: Run) -> str:
    """Return the machine's name."""
    return run.get("cpu") or run["device"]


def this_run() -> Run:
    """Return the provenance of a run on this CPU that begins now."""
    return provenance(this_cpu())


def this_cpu() -> dict[str, str]:
    """Return this CPU's model, and every setting and version that a figure may depend on."""
    found = sparsekern.info()
    return {
        "cpu": cpu_model(),
        "kernels": found.cpu["in use"],
        "threads": found.cpu["threads"],
        **{name: found.versions[name] for name in FACTS},
    }


def cpu_model() -> str:
    """Return the model as the kernel names it, or the architecture where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else f"unknown CPU ({torch.backends.cpu.get_cpu_capability()})"


def seconds(value: float) -> str:
    """Return a time with its unit: milliseconds below a second."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
