"""Perplexity of SmolLM2-135M by what is done beside solving each linear: `python -m bench.methods.stages FOLDER --only "SparseGPT 2:4, corrected"`.

FOLDER holds `valid.txt` and `test.txt` of WikiText-2. A figure is stored as soon as it is measured, with the minutes that `prune` took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparsekern

from .. import quality, smollm2
from . import Unavailable, shown, store, stored

NAME = "stages"
PATTERNS: dict[str, str | float] = {"2:4": "2:4", "50 %": 0.5, "70 %": 0.7}
METHODS = {"SparseGPT": sparsekern.SparseGPT, "ALPS": sparsekern.ALPS}
TUNE = sparsekern.BlockTuning(batch_tokens=2048, mixed_precision=True)
DISTILL = sparsekern.Distill(steps=45, batch_tokens=1024, mixed_precision=True)  # some three passes over the samples
STAGES: dict[str, dict[str, Any]] = {
    "alone": {},
    "corrected": {"correction": "dense"},
    "tuned": {"tune": TUNE},
    "distilled": {"distill": DISTILL},
    "corrected, tuned": {"correction": "dense", "tune": TUNE},
    "corrected, distilled": {"correction": "dense", "distill": DISTILL},
    "all": {"correction": "dense", "tune": TUNE, "distill": DISTILL},
}
CASES = [f"{method} {pattern}, {stages}" for pattern in PATTERNS for method in METHODS for stages in STAGES]


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    return section(measure(wikitext, CASES[:2] if quick else CASES, quick))


def measure(wikitext: Path, cases: list[str], quick: bool = False) -> dict[str, object]:
    """Return perplexity, fidelity and minutes by case. Each is stored when it is known, unless `quick`."""
    tokenizer = smollm2.tokenizer()
    ids, evaluation = quality.calibration(wikitext, tokenizer), quality.evaluation(wikitext, tokenizer)
    if quick:
        ids, evaluation = ids[:8], evaluation[: smollm2.WINDOW]
    figures: dict[str, object] = {}
    dense = smollm2.dense_model()
    for case in cases:
        solver, _, stages = case.partition(", ")
        method, _, pattern = solver.partition(" ")
        model, start = smollm2.dense_model(), time.perf_counter()
        sparsekern.prune(model, METHODS[method](), PATTERNS[pattern], ids, progress=False, **STAGES[stages])
        minutes = (time.perf_counter() - start) / 60
        of = sparsekern.fidelity(model, dense, evaluation, smollm2.WINDOW)
        found = {case: of.perplexity, f"{case}, minutes": minutes}
        found |= {f"{case}, divergence": of.divergence, f"{case}, agreement": of.agreement}
        if not quick:
            store(NAME, found)
        figures |= found
    return figures


def section(figures: dict[str, object]) -> str:
    def cell(case: str) -> str:
        minutes: Any = figures.get(f"{case}, minutes")
        perplexity: Any = figures.get(case)
        return shown(perplexity, ".2f") + ("" if minutes is None else f" ({minutes:.1f} min)")

    def fidelity_cell(case: str) -> str:
        divergence: Any = figures.get(f"{case}, divergence")
        agreement: Any = figures.get(f"{case}, agreement")
        return f"{shown(divergence, '.3f')}, {shown(agreement, '.1%')}"

    lines = [
        "## Stages beside the solver",
        "",
        f"SmolLM2-135M-Instruct (float32); calibration {smollm2.SAMPLES} x {smollm2.LENGTH} tokens of WikiText-2 `valid`, seed 0; perplexity of",
        f'the first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens of `test` (dense {quality.TARGETS["dense"][2]}). Corrected is `correction="dense"`,',
        f"tuned `tune=BlockTuning(batch_tokens={TUNE.batch_tokens})`, distilled `distill=Distill(steps={DISTILL.steps}, batch_tokens={DISTILL.batch_tokens})`,",
        "both with `mixed_precision=True`, all other settings the defaults. In parentheses the minutes of `prune` on one thread of a Zen 5,",
        "the other core being busy; cells without `distill` are of the runs that went on with it. The cells of SparseGPT ran on two threads of a Zen 3, tuned in float32.",
        "",
        *_table(cell, CASES),
    ]
    if any(key.endswith(", divergence") for key in figures):
        lines += [
            "",
            "The same models: divergence from the dense model's predictions on these tokens, in nats, and how often the top token is the same.",
            "",
            *_table(fidelity_cell, [case for case in CASES if f"{case}, divergence" in figures]),
        ]
    return "\n".join(lines) + "\n"


def _table(cell: Callable[[str], str], cases: list[str]) -> list[str]:
    """Return the lines of a table of the methods and patterns that some of `cases` are of."""
    lines = [f"| pattern | method | {' | '.join(STAGES)} |", f"|---|---|{'---|' * len(STAGES)}"]
    for pattern in PATTERNS:
        for method in METHODS:
            row = [f"{method} {pattern}, {stages}" for stages in STAGES]
            if not set(row).isdisjoint(cases):
                lines.append(f"| {pattern} | {method} | {' | '.join(map(cell, row))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="may be given more than once")
    arguments = parser.parse_args()
    measure(arguments.folder, arguments.only or CASES)
    print(section(stored(NAME)))


if __name__ == "__main__":
    main()
