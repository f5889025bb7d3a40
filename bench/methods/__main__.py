"""Measure the quality of the methods and write `bench/results/quality.md`: `python -m bench.methods --wikitext FOLDER`.

Each method has a section of its own, made from its figures in `bench/results/quality-<name>.json`. Figures that are not measured this
time are kept with their own date, commit and versions. `--only` without a name writes the page from the stored figures.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from sparsekern._files import write_atomically

from .. import results
from ..provenance import labels
from . import Unavailable, __path__, runs_of, stored

TITLE = """# Quality

What the methods reach on real models, each section with its conditions. `python -m bench.methods` measures and writes this page;
`--only NAME` measures one section again. Lower perplexities are better.
"""


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def measure(name: str, wikitext: Path | None, quick: bool) -> None:
    """Take one section's measurements and show it; where they cannot be taken, say why."""
    try:
        print(module(name).run(wikitext, quick))
    except Unavailable as reason:
        print(f"{name}: not measured, {reason}")


def write_page(of: Iterable[str], folder: Path = results.FOLDER) -> Path:
    """Write one page of all figures that are stored, in the order of the names, each section with its runs."""
    sections = []
    for name in of:
        if figures := stored(name, folder):
            runs = labels(runs_of(name, folder).values())
            sections += [module(name).section(figures).strip(), "\n".join(["Measured (date, commit):", "", *runs.described()])]
    page = folder / "quality.md"
    write_atomically(page, ("\n\n".join([TITLE.strip(), *sections]) + "\n").encode())
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, metavar="FOLDER", help="with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--only", nargs="*", choices=names(), metavar="NAME", help=f"of {', '.join(names())}; none: no measurement")
    parser.add_argument("--quick", action="store_true", help="a smaller problem; nothing is kept")
    arguments = parser.parse_args()
    for name in names() if arguments.only is None else arguments.only:
        measure(name, arguments.wikitext, arguments.quick)
    if not arguments.quick:
        print(f"wrote {write_page(names())}")


if __name__ == "__main__":
    main()
