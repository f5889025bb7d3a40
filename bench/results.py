"""Where figures go: `bench/results/<machine>.json`, and the same as a table a person can read beside it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import sparsekern
from sparsekern._files import write_atomically

FOLDER = Path(__file__).parent / "results"


@dataclass
class Row:
    """One figure against its goal. `met` is None where there is no goal; `details` are the numbers behind it."""

    section: str
    what: str
    reached: str
    against: str = ""
    goal: str = ""
    met: bool | None = None
    details: dict[str, object] = field(default_factory=dict)


def record(rows: list[Row], folder: Path = FOLDER, machine: dict[str, str] | None = None) -> Path:
    """Put `rows` in the place of those of the same name, keep the others, and write both files anew. Returns the table's path.

    `machine` is what they were measured on, its name first; None is this CPU.
    """
    machine = machine or this_cpu()
    path = folder / f"{_slug(title_of(machine))}{'-cpu' if 'cpu' in machine else ''}.json"
    kept = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []
    merged = {(row.section, row.what): row for row in (*kept, *rows)}
    ordered = sorted(merged.values(), key=lambda row: (row.section, row.what))
    content = {"machine": machine, "rows": [asdict(row) for row in ordered]}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(path.with_suffix(".md"), as_table(content["machine"], ordered).encode())
    return path.with_suffix(".md")


def as_table(machine: dict[str, str], rows: list[Row]) -> str:
    lines = ["# " + title_of(machine), "", ", ".join(f"{name} {value}" for name, value in list(machine.items())[1:]) + "."]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}", "", "| what | goal | reached | met | against |", "|---|---|---|---|---|"]
        for row in rows:
            if row.section == section:
                met = "" if row.met is None else "yes" if row.met else "**no**"
                lines.append(f"| {row.what} | {row.goal} | {row.reached} | {met} | {row.against} |")
    return "\n".join(lines) + "\n"


def title_of(machine: dict[str, str]) -> str:
    return next(iter(machine.values()))


def this_cpu() -> dict[str, str]:
    found = sparsekern.info()
    return {
        "cpu": cpu_model(),
        "kernels": found.cpu["in use"],
        "threads": found.cpu["threads"],
        **{name: found.versions[name] for name in ("sparsekern", "torch", "transformers", "python")},
    }


def cpu_model() -> str:
    """As the kernel names it, or the architecture where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else f"unknown CPU ({torch.backends.cpu.get_cpu_capability()})"


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
