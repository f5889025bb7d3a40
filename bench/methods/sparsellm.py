"""SparseLLM against its local solver alone: output error of the feed-forward networks and perplexity of SmolLM2-135M, and the ReLU form
on a small model trained here on built-in text.

    python -m bench.methods.sparsellm FOLDER --only "SparseGPT 70 %" --only "ALPS 2:4" --only relu --only time --only "one wide network"
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import sparsekern
from sparsekern import ALPS, SparseGPT, SparseLLM
from sparsekern.data import calibration_ids
from sparsekern.methods import Method

from .. import quality, smollm2
from . import Unavailable, _relu_model, _sparsellm_network, shown, store, stored

NAME = "sparsellm"
SAMPLES, LENGTH = 16, 512
PATTERNS = {"50 %": 0.5, "60 %": 0.6, "70 %": 0.7, "80 %": 0.8, "2:4": "2:4", "1:4": "1:4"}
SOLVERS: dict[str, Method] = {"SparseGPT": SparseGPT(), "ALPS": ALPS()}
FORMS = {  # `alone` is one round, which is the solver by itself and reports the same error
    "alone": {"iterations": 1},
    "inside": {},
    "inside, alpha 0.5": {"alpha": 0.5},
    "inside, attention pruned": {"attention": "pruned"},
}
RELU_FORMS = ("alone", "inside")


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    names = [f"{solver} {pattern}" for solver in SOLVERS for pattern in PATTERNS]
    figures = (
        measure(wikitext, names[:1] if quick else names, quick) | measure_relu(quick) | _sparsellm_network.measure(wikitext, quick)
    )
    if not quick:
        store(NAME, figures)
        for wide in _sparsellm_network.WIDE:
            store(NAME, _sparsellm_network.measure_wide(wide))
    return section(figures)


def measure(
    wikitext: Path, names: list[str], quick: bool = False, forms: Iterable[str] = FORMS, work: Path | None = None
) -> dict[str, object]:
    """Measure perplexity, and the mean over blocks of the output error of the feed-forward network, for each name and form.

    With `work`, a folder, a measurement that was killed continues.
    """
    tokenizer = smollm2.tokenizer()
    ids = calibration_ids(wikitext / "valid.txt", tokenizer, samples=SAMPLES, length=LENGTH, seed=0)
    evaluation = quality.evaluation(wikitext, tokenizer)
    if quick:
        ids, evaluation = ids[:2], evaluation[: smollm2.WINDOW]
    figures: dict[str, object] = {}
    for name in names:
        solver, _, pattern = name.partition(" ")
        for form in forms:
            model = smollm2.dense_model()
            out = work and work / f"{name}, {form}".replace(" ", "-").replace(",", "")
            layers = prune(model, SparseLLM(solver=SOLVERS[solver], **FORMS[form]), PATTERNS[pattern], ids, out)
            figures[f"{name}, {form}"] = {
                "perplexity": sparsekern.perplexity(model, evaluation, length=smollm2.WINDOW),
                "output_error": mean_output_error(layers),
                "output_error_alone": mean_output_error(layers, "output_error_alone"),
            }
            if out is not None:
                shutil.rmtree(out)
            print(name, form, figures[f"{name}, {form}"], flush=True)
    return figures


def prune(
    model: torch.nn.Module, method: Method, pattern: str | float, ids: torch.Tensor, out: Path | None
) -> list[dict[str, object]]:
    """Prune `model`, continue the run in `out`, or take what is finished there. Return the report's layers."""
    if out is not None and (out / "report.json").is_file():
        smollm2.put_weights(model, out / "model.safetensors")
        return json.loads((out / "report.json").read_text())["layers"]
    report = sparsekern.prune(model, method, pattern, ids, out=out, resume=out is not None, progress=False)
    return report.to_dict()["layers"]


def mean_output_error(layers: list[dict[str, object]], name: str = "output_error") -> float:
    errors = [layer[name] for layer in layers if layer[name] is not None]
    return sum(errors) / len(errors)


def measure_relu(quick: bool = False) -> dict[str, object]:
    """Measure the same for the small ReLU model, on held-out text of its training's domain."""
    model, ids, evaluation, figures = *_relu_model.trained(steps=20 if quick else _relu_model.STEPS), {}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    length = _relu_model.LENGTH
    figures["ReLU dense"] = {"perplexity": sparsekern.perplexity(model, evaluation, length=length)}
    for pattern in ("50 %", "70 %", "80 %", "2:4"):
        for form in RELU_FORMS:
            model.load_state_dict(weights)
            layers = prune(model, SparseLLM(**FORMS[form]), PATTERNS[pattern], ids, None)
            perplexity = sparsekern.perplexity(model, evaluation, length=length)
            errors = {name: mean_output_error(layers, name) for name in ("output_error", "output_error_alone")}
            figures[f"ReLU {pattern}, {form}"] = {"perplexity": perplexity, **errors}
            print("ReLU", pattern, form, figures[f"ReLU {pattern}, {form}"], flush=True)
    return figures


def section(figures: dict[str, object]) -> str:
    lines = [
        "## SparseLLM",
        "",
        f"SmolLM2-135M-Instruct (float32); calibration {SAMPLES} x {LENGTH} tokens of WikiText-2 `valid`, drawn with seed 0; perplexity of the",
        f"first {smollm2.WINDOWS} x {smollm2.WINDOW} tokens of `test` (dense {quality.TARGETS['dense'][2]}). Error: `|y' - y|^2 / |y|^2` of each",
        "feed-forward network's output on the calibration tokens that it is pruned with, mean over the 30 blocks. Defaults except for what the",
        "column says. *Alone* is a run of the solver by itself, whose networks get inputs of their own from the blocks below; *its first",
        "round* is the solver alone on the very inputs of *inside*. The goal is a lower error than the solver's alone at 70 % and above.",
        "",
        *_table(figures, [(solver, pattern) for solver in SOLVERS for pattern in PATTERNS], list(FORMS)),
        "",
        _relu_model.__doc__.partition("\n")[0]
        + f" Dense perplexity {_perplexity(figures, 'ReLU dense')}. Pruned with SparseGPT inside.",
        "",
        *_table(figures, [("ReLU", pattern) for pattern in PATTERNS], RELU_FORMS),
        *_time(figures.get("one network")),
        *_time_wide([figures[name] for name in _sparsellm_network.WIDE if name in figures]),
    ]
    return "\n".join(lines) + "\n"


def _table(figures: dict[str, object], rows: list[tuple[str, str]], forms: Sequence[str]) -> list[str]:
    """Return the table: a row for each solver and pattern, a column for each form, as far as anything is measured."""
    rows = [row for row in rows if any(_figure(figures, *row, form) for form in forms)]
    forms = [form for form in forms if any(_figure(figures, *row, form) for row in rows)]
    head = [
        "solver",
        "pattern",
        *(f"error, {form}" for form in forms),
        "its first round",
        *(f"perplexity, {form}" for form in forms),
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        found = [_figure(figures, *row, form) for form in forms]
        cells = [shown(each and each["output_error"], ".4f") for each in found]
        cells.append(shown((_figure(figures, *row, "inside") or {}).get("output_error_alone"), ".4f"))
        cells += [shown(each and each["perplexity"], ".2f") for each in found]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    return lines


def _figure(figures: dict[str, object], solver: str, pattern: str, form: str) -> dict | None:
    return figures.get(f"{solver} {pattern}, {form}")


def _time(found: dict | None) -> list[str]:
    if found is None:
        return []
    inputs, features, _ = found["shape"]
    ours, public = (found[f"{name}, seconds"] for name in ("sparsekern", "public"))
    errors = [f"{found[f'{name}, output_error']:.4f}" for name in ("sparsekern", "public")]
    return [
        "",
        f"One network of it (block {_sparsellm_network.BLOCK}, {inputs} -> {features} -> {inputs}: LLaMA-7B's shape is 7 times as wide), "
        f"{found['tokens']} tokens, 70 %,",
        f"four rounds, against the public program's algorithm in float32 (SVD pseudo-inverses), in one run: {public / ours:.1f} times as fast",
        f"(goal 10). Output error after the last round {errors[0]}, the public algorithm's {errors[1]}.",
    ]


def _time_wide(networks: list[dict]) -> list[str]:
    lines = ["", "The same with random weights in shapes of LLaMA-7B, whole and a quarter as wide, on correlated tokens:", ""]
    lines += ["| network | tokens | sparsekern | public | times as fast | error | public's |", "|---|---|---|---|---|---|---|"]
    for found in networks:
        ours, public = (found[f"{name}, seconds"] for name in ("sparsekern", "public"))
        errors = " | ".join(f"{found[f'{name}, output_error']:.4f}" for name in ("sparsekern", "public"))
        shape = " -> ".join(map(str, found["shape"]))
        lines.append(f"| {shape} | {found['tokens']} | {ours:.1f} s | {public:.1f} s | {public / ours:.1f} | {errors} |")
    lines += [
        "",
        "With fewer tokens than features the pseudo-inverses cost little: what both sides need, a factor and a sweep as wide as the hidden",
        "layer, takes most of the time (3.8e12 operations a round at full width, 14 s at the rate of MKL's products).",
    ]
    return lines if networks else []


def _perplexity(figures: dict[str, object], name: str) -> str:
    return shown(figures.get(name, {}).get("perplexity"), ".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help=f'such as "SparseGPT 70 %%", or "relu", "time", {", ".join(map(repr, _sparsellm_network.WIDE))}',
    )
    parser.add_argument("--form", action="append", choices=list(FORMS), help="may be given more than once")
    parser.add_argument("--work", type=Path, help="where a measurement that is killed leaves what it has, to go on from")
    arguments = parser.parse_args()
    for name in arguments.only:
        if name == "relu":
            store(NAME, measure_relu())
        elif name == "time":
            store(NAME, _sparsellm_network.measure(arguments.folder))
        elif name in _sparsellm_network.WIDE:
            store(NAME, _sparsellm_network.measure_wide(name))
        else:
            for form in arguments.form or FORMS:
                store(NAME, measure(arguments.folder, [name], forms=(form,), work=arguments.work))
    print(section(stored(NAME)))


if __name__ == "__main__":
    main()
