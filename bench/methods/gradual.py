"""Magnitude pruning and fine-tuning of SmolLM2-135M: before and after ten minutes of training, and size against perplexity over a grid.

The grid follows what Gholami and Omar (arXiv 2310.04573) study and reproduces none of their settings, which could not be read.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import sparsekern
from sparsekern import Gradual, Magnitude, Random, Structured
from sparsekern.data import calibration_ids, encode, read_documents
from sparsekern.methods import Method

from .. import smollm2
from . import Unavailable, shown, store, stored

NAME = "gradual"
LEARNING_RATE = 2e-4

TUNE_WINDOWS, TUNE_LENGTH = 64, 512  # trained on, one at a time
TUNE = Gradual(steps=1, batch_tokens=2 * (TUNE_LENGTH - 1), learning_rate=LEARNING_RATE)
SECONDS = "fine-tune, processor seconds"

CRITERIA: dict[str, Method] = {
    "magnitude, by layer": Magnitude(),
    "magnitude, global": Magnitude(scope="global"),
    "random": Random(),
    "structured": Structured(),
}
SPARSITIES = {"50 %": 0.5, "70 %": 0.7}
GRID_WINDOWS, GRID_LENGTH = 8, 256  # trained on, each an optimizer step
GRID_EVALUATION = (4, 1024)  # windows, tokens in each
PRUNING_STEPS = {"one step": None, "one step, trained": 1, "four steps, trained": 4}


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    cells = [(sparsity, criterion) for sparsity in SPARSITIES for criterion in CRITERIA]
    with TemporaryDirectory() as work:
        figures = tune(wikitext, Path(work), quick)
        for which in ("after", "before"):
            figures |= evaluate_tuning(which, wikitext, Path(work), quick)
    for sparsity, criterion in cells[:1] if quick else cells:
        for column in PRUNING_STEPS:
            figures |= measure_cell(wikitext, sparsity, criterion, column, quick)
    if not quick:
        store(NAME, figures)
    return section(figures)


def text(wikitext: Path, windows: int, length: int) -> torch.Tensor:
    return calibration_ids(wikitext / "valid.txt", smollm2.tokenizer(), samples=windows, length=length, seed=0)


def held_out(wikitext: Path, windows: int, length: int) -> torch.Tensor:
    return encode(read_documents(wikitext / "test.txt"), smollm2.tokenizer())[: windows * length]


def tune(wikitext: Path, work: Path, quick: bool) -> dict[str, object]:
    """Prune 50 % by magnitude and train, in `work`. A run that Ctrl-C has ended continues there; `work` also adds up its seconds."""
    ids, spent = text(wikitext, 4 if quick else TUNE_WINDOWS, TUNE_LENGTH), work / "seconds.txt"
    before = float(spent.read_text()) if spent.is_file() else 0.0
    start, model = time.process_time(), smollm2.dense_model()
    try:
        report = sparsekern.prune(model, TUNE, 0.5, ids, out=work / "tuned", resume=True, batch_size=1, progress=False)
    finally:
        spent.write_text(str(before + time.process_time() - start))
    return {"fine-tune, curve": [entry["loss"] for entry in report.training], SECONDS: float(spent.read_text())}


def evaluate_tuning(which: str, wikitext: Path, work: Path, quick: bool) -> dict[str, object]:
    """Measure perplexity at 50 % by magnitude, `"before"` and `"after"` training."""
    model = sparsekern.load(work / "tuned", device="cpu") if which == "after" else smollm2.dense_model()
    if which == "before":
        sparsekern.prune(model, "magnitude", 0.5, progress=False)
    evaluation = held_out(wikitext, 1 if quick else smollm2.WINDOWS, smollm2.WINDOW)
    return {f"fine-tune, {which}": sparsekern.perplexity(model, evaluation, smollm2.WINDOW)}


def measure_cell(wikitext: Path, sparsity: str, criterion: str, column: str, quick: bool) -> dict[str, object]:
    """Measure perplexity and size of one criterion at one sparsity, pruned and trained as the column says."""
    steps, model = PRUNING_STEPS[column], smollm2.dense_model()
    windows, length = (1, GRID_EVALUATION[1]) if quick else GRID_EVALUATION
    if steps is None:
        report = sparsekern.prune(model, CRITERIA[criterion], SPARSITIES[sparsity], progress=False)
    else:
        method = Gradual(
            CRITERIA[criterion], steps=steps, train_steps=GRID_WINDOWS // steps, batch_tokens=1, learning_rate=LEARNING_RATE
        )
        ids = text(wikitext, GRID_WINDOWS, GRID_LENGTH)
        report = sparsekern.prune(model, method, SPARSITIES[sparsity], ids, batch_size=1, progress=False)
    perplexity = sparsekern.perplexity(model, held_out(wikitext, windows, length), length)
    whole = criterion == "structured"
    return {
        f"{sparsity} {criterion}, {column}": {
            "perplexity": perplexity,
            "sparsity": report.sparsity,
            "bytes": size(model, report, whole),
        }
    }


def size(model: torch.nn.Module, report: sparsekern.Report, whole_units: bool) -> int:
    """Return bytes in bfloat16: the remaining weights of pruned linears, with one bit a weight unless whole rows and columns are removed."""
    total = sum(parameter.numel() for parameter in model.parameters())
    zeros = sum(layer.zeros for layer in report.layers)
    pruned = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    return 2 * (total - zeros) + (0 if whole_units else pruned // 8)


def section(figures: dict[str, object]) -> str:
    windows, length = GRID_EVALUATION
    lines = [
        "## Magnitude pruning and fine-tuning",
        "",
        "SmolLM2-135M-Instruct (float32), every linear of the blocks; trained on windows of WikiText-2 `valid`, drawn with seed 0,",
        f"by AdamW at a learning rate of {LEARNING_RATE:g} (linear warmup over a tenth, then down to zero), every parameter; perplexity on",
        "`test`. Inspired by, not reproducing, Gholami and Omar (arXiv 2310.04573).",
        "",
        f"**Fine-tuning at 50 %**, magnitude by layer, {TUNE_WINDOWS} windows of {TUNE_LENGTH} tokens once, two in an optimizer step; perplexity of the "
        f"first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens.",
        "",
        "| dense | pruned | fine-tuned | optimizer steps | loss of their batches | processor time |",
        "|---|---|---|---|---|---|",
        _tuning_row(figures),
        "",
        f"**The grid**: {GRID_WINDOWS} windows of {GRID_LENGTH} tokens, each an optimizer step (four pruning steps, on the cubic schedule, train on two each); perplexity",
        f"of the first {windows} x {length} tokens, and megabytes as bfloat16 values with a bit for each weight of a pruned linear (structured: without",
        "the bits; its zeros are whole heads and neurons, the share of them asked for being rounded down in each block). With so little",
        "training the columns compare criteria and schedules, and say nothing of what long training reaches.",
        "",
        "| | zeros in the linears | MB | " + " | ".join(PRUNING_STEPS) + " |",
        "|---|---|---|" + "---|" * len(PRUNING_STEPS),
        *(_grid_row(figures, sparsity, criterion) for sparsity in SPARSITIES for criterion in CRITERIA),
    ]
    return "\n".join(lines) + "\n"


def _tuning_row(figures: dict[str, object]) -> str:
    if "fine-tune, after" not in figures:
        return "| not measured | | | | | |"
    curve = figures["fine-tune, curve"]
    ends = [sum(part) / len(part) for part in (curve[:4], curve[-4:])]
    return (
        f"| 17.04 | {figures['fine-tune, before']:.2f} | {figures['fine-tune, after']:.2f} | {len(curve)} | "
        f"{ends[0]:.2f} in the first four, {ends[1]:.2f} in the last | {figures[SECONDS] / 60:.1f} minutes |"
    )


def _grid_row(figures: dict[str, object], sparsity: str, criterion: str) -> str:
    cells = [figures.get(f"{sparsity} {criterion}, {column}") for column in PRUNING_STEPS]
    known = next(filter(None, cells), None)
    about = [shown(known and known["sparsity"], ".1%"), shown(known and known["bytes"] / 1e6, ".0f")]
    perplexities = [shown(cell and cell["perplexity"], ".4g") for cell in cells]
    return f"| {sparsity} {criterion} | " + " | ".join(about + perplexities) + " |"


def main() -> None:
    """`python -m bench.methods.gradual FOLDER --work WORK` fine-tunes; with --cell it takes one row of the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, help="where the fine-tuning goes on after Ctrl-C")
    parser.add_argument("--cell", nargs=3, metavar=("SPARSITY", "CRITERION", "COLUMN"), help='such as "50 %%" random "one step"')
    arguments = parser.parse_args()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
        if SECONDS not in stored(NAME):
            store(NAME, tune(arguments.folder, arguments.work, quick=False))
        for which in ("after", "before"):
            if f"fine-tune, {which}" not in stored(NAME):
                store(NAME, evaluate_tuning(which, arguments.folder, arguments.work, quick=False))
    if arguments.cell:
        store(NAME, measure_cell(arguments.folder, *arguments.cell, quick=False))
    print(section(stored(NAME)))


if __name__ == "__main__":
    main()
