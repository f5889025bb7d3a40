"""Write the reference pages that follow from the code: ops from the registry, methods from their fields, commands from the parsers.

The table of models is made from families.json, which `python -m tests.models.zoo` writes from what it finds.
`python docs/generate.py` writes them; the pages are committed, and a test compares them with the code.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import sparsekern
from sparsekern import backends, ops
from sparsekern.cli.parser import make_parser
from sparsekern.methods import METHODS, settings_table
from sparsekern.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
os.environ["COLUMNS"] = "110"  # the width of argparse's help, whatever the terminal's
NOTE = "<!-- Written by docs/generate.py from the code; do not edit. -->"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)])


def summary(thing: object) -> str:
    """Return the first sentence of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def ops_page() -> str:
    rows, on_cpu = [], names_on_cpu()
    for name in sorted(OPS):
        found = [known.name for known in backends.implementations(name)]
        native = "yes" if name in on_cpu else ""
        rows.append(
            (
                f"[`{name}`](#{name.replace('_', '-').strip('-')})",
                summary(getattr(ops, name)),
                native,
                ", ".join(found) or "its reference",
            )
        )
    parts = [
        NOTE,
        "# Ops",
        "Ordinary torch ops in the namespace `sparsekern`: each has a schema, a PyTorch reference that runs on any device, and a fake for "
        "`torch.compile`. Native CPU kernels (scalar, AVX2, AVX-512) take over where they are built; CUDA C++ and Triton kernels do on NVIDIA "
        "GPUs of compute capability 8.0 and later, where they have not been run yet. `sparsekern info` prints which implementation runs and "
        'why another does not; `with sparsekern.backends.use(obs_sweep="triton"):` asks for one.',
        "Tokens are rows: `x` is `[tokens, features]`. Weights are `[out_features, in_features]`. **N:M keeps N of every M.**",
        table(("op", "does", "CPU kernel", "CUDA"), rows),
    ]
    for name in sorted(OPS):
        parts += [f"## {name}", f"```python\n{name}{signature(getattr(ops, name))}\n```", docstring(getattr(ops, name))]
    return "\n\n".join(parts) + "\n"


def names_on_cpu() -> set[str]:
    """Return the ops that csrc/cpu implements, whether or not it is built here."""
    sources = (ROOT / "csrc" / "cpu").glob("*.cpp")
    return {name for path in sources for name in re.findall(r'm\.impl\(\s*"(\w+)"', path.read_text(encoding="utf-8"))}


def signature(function: object) -> str:
    return str(inspect.signature(function)).replace("torch.", "").replace("'", "")


def docstring(thing: object) -> str:
    return f"```text\n{inspect.getdoc(thing)}\n```"


def methods_page() -> str:
    parts = [
        NOTE,
        "# Methods",
        "Every setting is a field of the method's config, and `--set NAME=VALUE` on the command line. `sparsekern prune --help-method NAME` "
        "prints one method's.",
    ]
    for name, method in sorted(METHODS.items()):
        parts += [f"## {method.__name__}", f'`method="{name}"`, `--method {name}`', docstring(method)]
        if rows := settings_table(method):
            parts.append(rows)
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    parts = [NOTE, "# Command line", "Exit code 0: done; 1: it failed; 2: it was called wrongly; 130: interrupted."]
    parser = make_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    for name, command in commands.items():
        parts += [f"## {name}", f"```text\n{command.format_help().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    parts = [NOTE, "# Python API", "```{eval-rst}\n.. currentmodule:: sparsekern\n```"]
    for name in sorted(sparsekern.__all__, key=str.lower):
        thing = getattr(sparsekern, name)
        kind = "autoclass" if inspect.isclass(thing) else "autofunction" if callable(thing) else None
        if kind:
            parts.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: sparsekern.{name}\n```")
    return "\n\n".join(parts) + "\n"


def models_page() -> str:
    families = json.loads((ROOT / "docs" / "families.json").read_text(encoding="utf-8"))
    rows = []
    for row in sorted(families.values(), key=lambda row: row["class"].lower()):
        blocks = ", ".join(f"`{name}`" for name in row.get("blocks", ()))
        pruned = by_owner(row["pruned"]) if "pruned" in row else f"refused: *{row['refused']}*"
        packed = with_reasons(row["unpacked"]) or "all" if "unpacked" in row else ""
        rows.append((f"`{row['type']}`", f"`{row['class']}`", blocks, pruned, with_reasons(row.get("dense", {})), packed))
    head = ("model type", "class", "lists of blocks", "pruned in each block", "stays dense, and why", "packed: all, or all but")
    parts = [
        NOTE,
        "# Models",
        "Blocks and linears are found by structure, so a model that is not in this table works too if it is built like one that is. "
        "The table is what a test finds. It builds each model with random weights, prunes it with Wanda to 2:4, and compares each "
        "decision with the inputs of that weight in a plain forward of the whole model. Then it saves the model, loads it with "
        "`sparsekern.load` and with plain transformers, and compares each tensor; and it packs the model.",
        "Embeddings and heads are outside the blocks and stay dense unless they are named. `*` stands for a number.",
        table(head, rows),
    ]
    return "\n\n".join(parts) + "\n"


def with_reasons(names: dict[str, str]) -> str:
    return "; ".join(f"`{name}` ({reason})" for name, reason in names.items())


def by_owner(names: Iterable[str]) -> str:
    """Return names of linears, with those of one module together."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owner, dot, own = name.rpartition(".")
        owners.setdefault(owner + dot, []).append(own)
    return "; ".join(f"`{owner}{own[0] if len(own) == 1 else '{' + ', '.join(own) + '}'}`" for owner, own in owners.items())


PAGES = {"models.md": models_page, "ops.md": ops_page, "methods.md": methods_page, "cli.md": cli_page, "api.md": api_page}


def write_all(folder: Path) -> None:
    """Write every page into `folder`."""
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
