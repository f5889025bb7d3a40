"""ALPS against SparseGPT: perplexity of SmolLM2-135M, and the error of one block's linears against the public program in float64."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sparsekern
from baselines.textbook import textbook_alps
from sparsekern.methods import Method
from sparsekern.methods.statistics import Gram
from sparsekern.pattern import parse_pattern

from .. import quality, smollm2
from . import Unavailable, shown, store, stored

NAME = "alps"
PATTERNS = {"50 %": 0.5, "2:4": "2:4", "70 %": 0.7}
BLOCK = 12
TEXTBOOK = {"50 %": {"sparsity": 0.5}, "2:4": {"n_kept": 2, "m": 4}, "70 %": {"sparsity": 0.7}}


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    names = [f"{method} {pattern}" for pattern in PATTERNS for method in ("SparseGPT", "ALPS")]
    figures = measure_perplexities(wikitext, names[:2] if quick else names, quick)
    figures |= measure_errors(wikitext, quick)
    if not quick:
        store(NAME, figures)
    return section(figures)


def measure_perplexities(wikitext: Path, names: list[str], quick: bool, work: Path | None = None) -> dict[str, object]:
    """Return perplexities by name; with `work`, a folder, a run that was killed continues."""
    tokenizer = smollm2.tokenizer()
    ids, evaluation = quality.calibration(wikitext, tokenizer), quality.evaluation(wikitext, tokenizer)
    if quick:
        ids, evaluation = ids[:2], evaluation[: smollm2.WINDOW]
    figures: dict[str, object] = {}
    for name in names:
        model = pruned(name, ids, work and work / "-".join(name.replace(":", "of").replace("%", "percent").split()))
        figures[f"perplexity, {name}"] = sparsekern.perplexity(model, evaluation, length=smollm2.WINDOW)
    return figures


def pruned(name: str, ids: torch.Tensor, out: Path | None) -> torch.nn.Module:
    if out and (out / "report.json").is_file():
        return sparsekern.load(out, dtype="float32", device="cpu")
    model, (method, pattern, _) = smollm2.dense_model(), quality.TARGETS[name]
    sparsekern.prune(model, method, pattern, ids, out=out, resume=out is not None, progress=False)
    return model


def measure_errors(wikitext: Path, quick: bool) -> dict[str, object]:
    """Return the mean relative output error of one dense block's linears: ours, SparseGPT's, and the public ALPS's in float64."""
    model = smollm2.dense_model()
    ids = quality.calibration(wikitext, smollm2.tokenizer())
    linears = linears_of_block(model, ids[:2] if quick else ids, features=model.config.hidden_size)
    figures: dict[str, object] = {}
    for label, pattern in PATTERNS.items():
        for method in (sparsekern.ALPS(), sparsekern.SparseGPT()):
            errors = [relative_error(weight, solve(method, weight, gram, pattern), gram) for weight, gram in linears]
            figures[f"error, {type(method).__name__} {label}"] = sum(errors) / len(errors)
        errors = [relative_error(w, textbook_alps(w.double(), full(g).double(), **TEXTBOOK[label])[0], g) for w, g in linears]
        figures[f"error, public ALPS in float64 {label}"] = sum(errors) / len(errors)
    return figures


def linears_of_block(model: torch.nn.Module, ids: torch.Tensor, features: int) -> list[tuple[torch.Tensor, Gram]]:
    """Return weight and statistics of those linears of a block that have `features` inputs."""
    block = model.model.layers[BLOCK]
    found = {
        m: Gram(features, torch.device("cpu"))
        for m in block.modules()
        if isinstance(m, torch.nn.Linear) and m.in_features == features
    }
    hooks = [m.register_forward_pre_hook(lambda m, inputs: found[m].add(inputs[0].flatten(0, -2), None)) for m in found]
    with torch.no_grad():
        for sample in ids:
            model(sample[None])
    for hook in hooks:
        hook.remove()
    return [(m.weight.detach(), gram) for m, gram in found.items()]


def solve(method: Method, weight: torch.Tensor, gram: Gram, pattern: str | float) -> torch.Tensor:
    return method.solve(weight, gram, parse_pattern(pattern)).weight


def full(gram: Gram) -> torch.Tensor:
    return gram.gram.tril() + gram.gram.tril(-1).T


def relative_error(weight: torch.Tensor, new_weight: torch.Tensor, gram: Gram) -> float:
    g, w = full(gram).double(), weight.double()
    d = new_weight.double() - w
    return float(((d @ g) * d).sum() / ((w @ g) * w).sum())


def section(figures: dict[str, object]) -> str:
    def cell(kind: str, who: str, pattern: str) -> str:
        return shown(figures.get(f"{kind}, {who} {pattern}"), ".2f" if kind == "perplexity" else ".5f")

    lines = [
        "## ALPS",
        "",
        f"SmolLM2-135M-Instruct (float32); calibration {smollm2.SAMPLES} x {smollm2.LENGTH} tokens of WikiText-2 `valid`, drawn with seed 0;",
        f"perplexity of the first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens of `test` (dense {quality.TARGETS['dense'][2]}). Target: a plain",
        "prototype of ALPS on the same number of tokens. All settings are the defaults.",
        "",
        "| pattern | SparseGPT | ALPS | target (+ 1 %) | met |",
        "|---|---|---|---|---|",
    ]
    for label in PATTERNS:
        target, reached = quality.TARGETS[f"ALPS {label}"][2], figures.get(f"perplexity, ALPS {label}")
        met = "not measured" if reached is None else "yes" if reached <= target * quality.WITHIN else "**no**"
        cells = [cell("perplexity", who, label) for who in ("SparseGPT", "ALPS")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {target} ({target * quality.WITHIN:.2f}) | {met} |")
    lines += [
        "",
        "### Output error",
        "",
        f"Relative output error `|X (W' - W)^T|^2 / |X W^T|^2` on the calibration tokens, mean over the linears of block {BLOCK} that read the",
        "hidden state (all blocks dense):",
        "",
        "| pattern | SparseGPT | ALPS | public ALPS, float64 |",
        "|---|---|---|---|",
        *(
            f"| {label} | "
            + " | ".join(cell("error", who, label) for who in ("SparseGPT", "ALPS", "public ALPS in float64"))
            + " |"
            for label in PATTERNS
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """`python -m bench.methods.alps FOLDER --only "ALPS 50 %"` takes single figures; the others stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, help="where a run that is killed leaves what it has, to go on from")
    parser.add_argument("--only", action="append", default=[], metavar="FIGURE", help='such as "ALPS 50 %%", or "errors"')
    arguments = parser.parse_args()
    names = [name for name in arguments.only if name != "errors"]
    figures = measure_perplexities(arguments.folder, names, quick=False, work=arguments.work) if names else {}
    if "errors" in arguments.only:
        figures |= measure_errors(arguments.folder, quick=False)
    store(NAME, figures)
    print(section(stored(NAME)))


if __name__ == "__main__":
    main()
