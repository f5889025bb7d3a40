"""Perplexity of SmolLM2-135M made a mixture, with whole experts removed: `python -m bench.methods --wikitext FOLDER --only experts`.

The mixture has the conditions of `moefy`. As many experts are active for a token before and after the removal.
"""

from __future__ import annotations

import copy
from pathlib import Path

import sparsekern

from .. import smollm2
from . import Unavailable, gradual, shown, store
from .moefy import EXPERTS, LENGTH, SAMPLES, WINDOW, WINDOWS

NAME = "experts"
ACTIVE = 7  # of 15, besides the one that is always active
REMOVED = (0.25, 0.5)
SCORES = ("reap", "man", "frequency")


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    calibration = gradual.text(wikitext, 4 if quick else SAMPLES, LENGTH)
    evaluation = gradual.held_out(wikitext, 1 if quick else WINDOWS, WINDOW)
    mixture = sparsekern.moefy(smollm2.dense_model(), EXPERTS, ACTIVE, calibration=calibration, progress=False)
    figures: dict[str, object] = {"none": sparsekern.perplexity(mixture, evaluation, WINDOW)}
    for score in SCORES[:1] if quick else SCORES:
        for share in REMOVED:
            smaller = copy.deepcopy(mixture)
            method = sparsekern.ExpertPruning(score=score, remove=share)
            report = sparsekern.prune(smaller, method, calibration=calibration, progress=False)
            figures[f"{score}, {share}"] = sparsekern.perplexity(smaller, evaluation, WINDOW)
            figures[f"left, {share}"] = report.experts[1]
            if not quick:
                store(NAME, figures)
    return section(figures)


def section(figures: dict[str, object]) -> str:
    head = [f"{share:.0%} removed ({figures.get(f'left, {share}', '?')} of {EXPERTS - 1} left)" for share in REMOVED]
    lines = [
        "## Experts removed from that mixture",
        "",
        f"The same mixture with {ACTIVE} routed experts and the shared one active (perplexity {shown(figures.get('none'), '.2f')}), by the share of its",
        f"{EXPERTS - 1} routed experts that `ExpertPruning` removes from each layer. As many are active afterwards. Nothing is trained. Experts of a",
        "dense network are divided by which neurons are active together, so none is superfluous: a trained mixture loses less.",
        "",
        "| score | " + " | ".join(head) + " |",
        "|---|" + "---|" * len(head),
    ]
    for score in SCORES:
        cells = [shown(figures.get(f"{score}, {share}"), ".2f") for share in REMOVED]
        lines.append(f"| `{score}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
