"""Quality of each method on real models: `python -m bench.methods` writes `bench/results/quality.md`.

The module of a method's name in this package has

    def run(wikitext: Path | None, quick: bool) -> str: ...
    def section(figures: dict[str, object]) -> str: ...

`run` measures, stores its figures by `store(name, figures)` in `bench/results/quality-<name>.json`, and returns their section. `section`
returns the page's section of the stored figures in Markdown, from its `## ` heading on, with their conditions (model, tokens, windows,
seeds). It calls figures that do not exist yet "not measured". `wikitext` is a folder with `valid.txt` and `test.txt` of WikiText-2; where
it is None, a module that needs it raises `Unavailable`. `quick` tries the module out on a smaller problem and stores nothing. A module
whose name starts with `_` is a helper.
"""

from __future__ import annotations

import json
from pathlib import Path

from sparsekern._files import write_atomically

from .. import results
from ..provenance import Run


class Unavailable(Exception):
    """Something that a measurement needs is missing; the message names it."""


def path_of(name: str, folder: Path = results.FOLDER) -> Path:
    return folder / f"quality-{name}.json"


def store(name: str, figures: dict[str, object], folder: Path = results.FOLDER, run: Run | None = None) -> None:
    """Write `figures` in place of those of the same key, and keep the others, each with the provenance of its own run.

    `run` is the provenance of `figures`; None is a run on this CPU now.
    """
    kept, run = stored(name, folder), run or results.this_run()
    runs = {key: earlier for key, earlier in runs_of(name, folder).items() if key in kept} | dict.fromkeys(figures, run)
    content = {"figures": kept | figures, "runs": runs}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path_of(name, folder), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def stored(name: str, folder: Path = results.FOLDER) -> dict[str, object]:
    """Return the figures of earlier runs."""
    path = path_of(name, folder)
    return json.loads(path.read_text())["figures"] if path.is_file() else {}


def runs_of(name: str, folder: Path = results.FOLDER) -> dict[str, Run]:
    """Return the provenance of each figure by its key."""
    path = path_of(name, folder)
    return json.loads(path.read_text())["runs"] if path.is_file() else {}


def shown(value: float | None, text: str) -> str:
    """Return a figure for the page's tables in the format `text`; "not measured" for None."""
    return "not measured" if value is None else format(value, text)
