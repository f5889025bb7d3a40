"""The best pruned SmolLM2-135M within an hour of two cores: `python -m bench.methods.stack FOLDER --work RUNS --only "2:4"`.

ALPS with corrected targets, then distillation on more text. FOLDER holds `valid.txt` and `test.txt` of WikiText-2. RUNS keeps each run, so
that a killed one goes on. Settings were chosen by the divergence of held-out windows of `valid`, `test` was looked at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import sparsekern
from sparsekern.data import evaluation_ids

from .. import quality, smollm2
from . import Unavailable, shown, store, stored

NAME = "stack"
PATTERNS: dict[str, tuple[str | float, float]] = {"50 %": (0.5, 19.2), "2:4": ("2:4", 21.5), "70 %": (0.7, 26.5)}  # with its goal
SAMPLES = 128
DISTILL = sparsekern.Distill(steps=215, samples=448, learning_rate=1.2e-4, batch_tokens=1024)
OTHER = "builtin:python-docs"
COLUMNS = {
    "perplexity": ".2f",
    "divergence": ".3f",
    "same top token": ".1%",
    "other text": ".2f",
    "divergence before": ".3f",
    "divergence after": ".3f",
    "processor minutes": ".0f",
}


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    return section(measure(wikitext, list(PATTERNS), None, quick))


def measure(wikitext: Path, patterns: list[str], work: Path | None, quick: bool = False) -> dict[str, object]:
    """Return what is known of each pattern by `PATTERN, COLUMN`. Each is stored when it is measured, unless `quick`."""
    figures: dict[str, object] = {}
    for name in ["dense", *patterns]:
        figures |= (found := measured(name, wikitext, None if work is None else work / name.replace(" ", ""), quick))
        if not quick:
            store(NAME, found)
    return figures


def measured(name: str, wikitext: Path, out: Path | None, quick: bool) -> dict[str, object]:
    """Prune as `name` says, or not at all, and return what is known of it."""
    model, tokenizer = smollm2.dense_model(), smollm2.tokenizer()
    found: dict[str, object] = {}
    if name != "dense":
        distill = sparsekern.Distill(steps=1, batch_tokens=512) if quick else DISTILL
        text = {"tokenizer": tokenizer, "samples": 2 if quick else SAMPLES, "length": smollm2.LENGTH}
        resume = {} if out is None else {"out": out, "resume": (out / "checkpoint").is_dir()}
        start = time.process_time()
        report = sparsekern.prune(
            model,
            "alps",
            PATTERNS[name][0],
            wikitext / "valid.txt",
            correction="dense",
            distill=distill,
            progress=False,
            **text,
            **resume,
        )
        curve = report.distillation
        found |= {"divergence before": curve[0]["kl"], "divergence after": curve[-1]["kl"], "curve": curve}
        found["processor minutes"] = (time.process_time() - start) / 60  # of this process, if it goes on with a killed run
    test = quality.evaluation(wikitext, tokenizer)
    other = evaluation_ids(OTHER, tokenizer, smollm2.WINDOW, windows=smollm2.WINDOWS)
    test = test[: smollm2.WINDOW] if quick else test
    if name == "dense":
        found["perplexity"] = sparsekern.perplexity(model, test, length=smollm2.WINDOW)
    else:
        of = sparsekern.fidelity(model, smollm2.dense_model(), test, smollm2.WINDOW)
        found |= {"perplexity": of.perplexity, "divergence": of.divergence, "same top token": of.agreement}
    found["other text"] = sparsekern.perplexity(model, other[:1] if quick else other)
    return {f"{name}, {column}": value for column, value in found.items()}


def section(figures: dict[str, object]) -> str:
    def cell(name: str, column: str, text: str) -> str:
        value: Any = figures.get(f"{name}, {column}")
        return shown(value, text)

    lines = [
        "## The whole stack, an hour of two cores",
        "",
        f'SmolLM2-135M-Instruct (float32): `ALPS()` with `correction="dense"` on {SAMPLES} x {smollm2.LENGTH} tokens of WikiText-2 `valid`,',
        f"then `Distill(steps={DISTILL.steps}, samples={DISTILL.samples}, learning_rate={DISTILL.learning_rate:g}, batch_tokens={DISTILL.batch_tokens})` on the same text, seed 0.",
        f"Perplexity of the first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens of `test`, and of as many held-out ones of `{OTHER}`, a text that nothing was fitted to.",
        "Divergence from the dense model's predictions, and how often the top token is the same, on the tokens of `test`.",
        "The last two divergences are on held-out tokens of `valid`, before and after the distillation.",
        "At 2:4 the solver and the distillation ran in two processes, on a busy machine, with the solver's weights stored between them.",
        "",
        f"| pattern | goal | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for name in ["dense", *PATTERNS]:
        goal = "" if name == "dense" else f"{PATTERNS[name][1]}"
        cells = [
            "" if name == "dense" and column not in ("perplexity", "other text") else cell(name, column, text)
            for column, text in COLUMNS.items()
        ]
        lines.append(f"| {name} | {goal} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, metavar="RUNS", help="folder of the runs; none keeps nothing")
    parser.add_argument("--only", action="append", choices=list(PATTERNS), metavar="PATTERN", help="may be given more than once")
    arguments = parser.parse_args()
    measure(arguments.folder, arguments.only or list(PATTERNS), arguments.work)
    print(section(stored(NAME)))


if __name__ == "__main__":
    main()
