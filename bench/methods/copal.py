"""Forgetting in continual pruning, on three domains in all six orders.

One domain is WikiText-2; the other two, the documentation and the source of the Python that runs this, ship with Python.
SmolLM2-135M-Instruct in float32; 8 x 512 tokens of calibration a domain (seed 0); perplexity of the first 2 windows of 2048 tokens of
`test.txt` and of the held-out parts.

A data set's step depends only on those before it, so orders that begin alike share their steps: 3 + 6 + 6 for what accumulates, and 3
where each data set prunes the dense weights. What is carried over never changes after the first data set
(`tests/pruning/test_continual.py` shows it to the bit), so its figures are those of the first data set's model. All of it takes hours
on a few cores. A work folder (10 GB a method) keeps each step's figures and state, so that a run that is stopped can continue.
`python -m bench.methods.copal WIKITEXT --work FOLDER --only COPAL --pattern 0.5` measures one part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from statistics import mean

import torch

import sparsekern
from sparsekern import COPAL, Magnitude, SparseGPT, Wanda
from sparsekern.data import calibration_ids, encode, read_documents
from sparsekern.reports import ContinualReport, ContinualStep

from .. import smollm2
from . import Unavailable, store, stored

NAME = "copal"
WORK = Path(tempfile.gettempdir()) / "sparsekern-bench-copal"
SAMPLES, LENGTH = 8, 512
WINDOWS, WINDOW = 2, 2048
DOMAINS = ("wiki", "docs", "code")
Order = tuple[str, ...]
# In the cyclic orders each domain comes first, second and last once.
ORDERS = {"all": list(permutations(DOMAINS)), "cyclic": [DOMAINS, ("docs", "code", "wiki"), ("code", "wiki", "docs")]}
METHODS = {
    "magnitude": (Magnitude(), "dense"),
    "Wanda, from dense": (Wanda(), "dense"),
    "Wanda, carried": (Wanda(), "carry"),
    "Wanda, accumulated": (Wanda(), "accumulate"),
    "SparseGPT, from dense": (SparseGPT(), "dense"),
    "SparseGPT, carried": (SparseGPT(), "carry"),
    "SparseGPT, accumulated": (SparseGPT(), "accumulate"),
    "COPAL, from dense": (COPAL(), "dense"),
    "COPAL": (COPAL(), "accumulate"),
}
PATTERNS = ("0.5", "2:4", "4:8")


class Texts:
    """The tokens of the three domains."""

    def __init__(self, wikitext: Path, windows: int = WINDOWS) -> None:
        words = smollm2.tokenizer()
        sources = {"wiki": wikitext / "valid.txt", "docs": "builtin:python-docs", "code": "builtin:python-source"}
        self.calibration = {n: calibration_ids(s, words, samples=SAMPLES, length=LENGTH, seed=0) for n, s in sources.items()}
        sources["wiki"] = wikitext / "test.txt"
        held_out = {name: encode(read_documents(source, "held-out"), words) for name, source in sources.items()}
        self.evaluation = {name: ids[: windows * WINDOW] for name, ids in held_out.items()}

    def perplexities(self, model: torch.nn.Module, names: tuple[str, ...] = DOMAINS) -> dict[str, float]:
        return {name: sparsekern.perplexity(model, self.evaluation[name], WINDOW) for name in names}


def kept(path: Path, measure: Callable[[], dict]) -> dict:
    """Return what `measure` returns, from `path` where it was measured before."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = json.dumps(measure())
        path.with_suffix(".tmp").write_text(found)
        os.replace(path.with_suffix(".tmp"), path)
        print(path, found, flush=True)
    return json.loads(path.read_text())


def of_one_data_set(method, pattern: str, name: str, texts: Texts, work: Path) -> dict[str, float]:
    """Return the perplexities of the dense model pruned for one data set."""

    def measure() -> dict[str, float]:
        model = smollm2.dense_model()
        sparsekern.prune_continually(model, {name: texts.calibration[name]}, method, pattern, strategy="dense", progress=False)
        return texts.perplexities(model)

    return kept(work / f"{name}.json", measure)


def accumulated(method, pattern: str, orders: Sequence[Order], texts: Texts, work: Path) -> dict[Order, dict[str, float]]:
    """Return, for each beginning of each order, the perplexities after its last step that the figures need."""
    results: dict[Order, dict[str, float]] = {}
    for order in orders:
        for length in range(1, len(order) + 1):
            names = order[:length]
            path = work / f"{'-'.join(names)}.json"
            results[names] = kept(path, lambda names=names: after_step(method, pattern, names, texts, work))
        shutil.rmtree(work / "-".join(order), ignore_errors=True)  # nothing follows a whole order
    return results


def after_step(method, pattern: str, names: Order, texts: Texts, work: Path) -> dict[str, float]:
    """Add the last of `names` to the state of those before it, and write the state for those that follow."""
    state, before, copy = (work / "-".join(part) for part in (names, names[:-1], (*names, "copy")))
    if names[:-1] and not state.exists():  # the files of a state never change, so links will do
        if not before.exists():
            raise RuntimeError(f"{before} is gone, but not its figures; remove {work} to measure again")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(
            before, copy, copy_function=os.link, ignore=shutil.ignore_patterns(".*")
        )  # each state has a lock of its own
        copy.rename(state)
    model, calibration = smollm2.dense_model(), {names[-1]: texts.calibration[names[-1]]}
    sparsekern.prune_continually(model, calibration, method, pattern, state=state, resume=True, progress=False)
    return texts.perplexities(model, DOMAINS if len(names) == len(DOMAINS) else names[-1:])


def reports(label: str, pattern: str, orders: Sequence[Order], texts: Texts, work: Path) -> list[ContinualReport]:
    """Return, for each order, what `prune_continually` would report of the method."""
    method, strategy = METHODS[label]
    if strategy == "accumulate":
        after = accumulated(method, pattern, orders, texts, work / pattern / label)
    else:
        folder = work / pattern / label.replace("carried", "from dense")  # of which the carried figures are some
        alone = {name: of_one_data_set(method, pattern, name, texts, folder) for name in DOMAINS}
        after = {order[:t]: alone[order[0 if strategy == "carry" else t - 1]] for order in orders for t in (1, 2, 3)}

    def step(names: Order) -> ContinualStep:
        found = {name: after[names][name] for name in names if name in after[names]}
        return ContinualStep(names[-1], SAMPLES * LENGTH, float("nan"), None, float("nan"), found)

    return [ContinualReport(steps=[step(order[:t]) for t in (1, 2, 3)]) for order in orders]


def row(found: list[ContinualReport]) -> dict:
    forgotten = [report.backward_transfer for report in found]
    last = {name: mean(report.steps[-1].perplexity[name] for report in found) for name in DOMAINS}
    return {
        "average perplexity": mean(report.average_perplexity for report in found),
        "backward transfer": mean(forgotten),
        "worst order": min(forgotten),
        "best order": max(forgotten),
        "after the last step": last,
        "orders": [{"order": report.names, "matrix": report.matrix} for report in found],
    }


def table(dense: dict[str, float], rows: dict[str, dict[str, dict]]) -> str:
    """Return the section of the results in Markdown."""
    lines = [
        "## Continual pruning (COPAL)",
        "",
        f"SmolLM2-135M-Instruct, float32; {SAMPLES} x {LENGTH} tokens of calibration a domain, seed 0; perplexity of {WINDOWS} windows of "
        f"{WINDOW} tokens a domain; means over the orders of WikiText-2, Python's documentation and Python's source: all six, or the three cyclic ones. Backward "
        "transfer is the mean of `R[i, i] - R[T, i]`: **negative is forgetting**. COPAL is a reconstruction. The rows called carried are "
        "taken from the model of the first data set: what is carried on to later ones never changes after it (to the bit).",
        "",
        "Dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()) + f"; average {mean(dense.values()):.2f}.",
    ]
    for pattern, by_label in rows.items():
        lines += ["", f"### {'50 %' if pattern == '0.5' else pattern}", ""]
        lines += [
            "| method | orders | average perplexity at the end | backward transfer (worst, best order) | wiki | docs | code |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for label, found in by_label.items():
            each = " | ".join(f"{found['after the last step'][name]:.2f}" for name in DOMAINS)
            lines.append(
                f"| {label} | {len(found['orders'])} | {found['average perplexity']:.2f} | {found['backward transfer']:+.2f} "
                f"({found['worst order']:+.2f}, {found['best order']:+.2f}) | {each} |"
            )
        lowest = min(by_label, key=lambda label: by_label[label]["average perplexity"])
        lines += ["", f"The lowest average at the end is that of {lowest}."]
        if goals := goals_met(by_label):
            lines += ["", goals]
    return "\n".join(lines) + "\n"


def goals_met(by_label: dict[str, dict]) -> str:
    """Return whether COPAL meets its goals: it forgets less than methods from dense, and ends no worse than Wanda. Empty if not measured."""
    rivals = ("Wanda, from dense", "SparseGPT, from dense")
    if not {"COPAL", *rivals} <= by_label.keys():
        return ""
    copal, wanda = by_label["COPAL"], by_label[rivals[0]]
    said = []
    for rival in rivals:
        less = copal["backward transfer"] > by_label[rival]["backward transfer"]
        said.append(f"forgets less than {rival}: {'yes' if less else '**no**'}")
    ratio = copal["average perplexity"] / wanda["average perplexity"] - 1
    said.append(
        f"average perplexity at the end no worse than Wanda's from dense: {'yes' if ratio <= 0 else '**no**'} ({ratio:+.1%})"
    )
    return "Goals for COPAL: " + "; ".join(said) + "."


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    if quick:
        with tempfile.TemporaryDirectory() as work:
            return table(
                *measure(Texts(wikitext, windows=1), Path(work), ["Wanda, from dense", "Wanda, carried"], PATTERNS[:1], "all")
            )
    measure_and_store(wikitext, WORK, list(METHODS), PATTERNS, "all")
    return section(stored(NAME))


def measure(texts: Texts, work: Path, labels: Sequence[str], patterns: Sequence[str], orders: str) -> tuple[dict, dict]:
    dense = kept(work / "dense.json", lambda: texts.perplexities(smollm2.dense_model()))
    return dense, {pattern: {m: row(reports(m, pattern, ORDERS[orders], texts, work)) for m in labels} for pattern in patterns}


def measure_and_store(wikitext: Path, work: Path, labels: Sequence[str], patterns: Sequence[str], orders: str) -> None:
    dense, rows = measure(Texts(wikitext), work, labels, patterns, orders)
    figures = {f"{pattern}, {label}, {orders}": found for pattern, by_label in rows.items() for label, found in by_label.items()}
    store(NAME, {"dense": dense, **figures})


def section(figures: dict) -> str:
    """Return the section of the stored figures; of a method with figures of both, those of all orders."""
    rows: dict[str, dict[str, dict]] = {}
    for pattern in PATTERNS:
        for label in METHODS:
            found = [figures[key] for orders in ORDERS if (key := f"{pattern}, {label}, {orders}") in figures]
            if found:
                rows.setdefault(pattern, {})[label] = found[0]
    return table(figures["dense"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wikitext", type=Path, metavar="WIKITEXT", help="folder with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER")
    parser.add_argument("--only", action="append", choices=list(METHODS), help="may be given more than once")
    parser.add_argument("--pattern", action="append", choices=PATTERNS, help="may be given more than once")
    parser.add_argument(
        "--orders", default="all", choices=list(ORDERS), help="cyclic: three, in which each domain has every place once"
    )
    arguments = parser.parse_args()
    labels, patterns = arguments.only or list(METHODS), arguments.pattern or PATTERNS
    measure_and_store(arguments.wikitext, arguments.work, labels, patterns, arguments.orders)
    print(section(stored(NAME)))


if __name__ == "__main__":
    main()
