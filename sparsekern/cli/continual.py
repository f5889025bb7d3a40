"""What `sparsekern prune` does with more than one `--calibration`, or with a `--state`: one data set after another."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch

from ..backends.libraries import check_isa
from ..data import calibration_ids
from ..pruning import check_seed, prune_continually
from ..pruning.continual.loop import check_adds_up
from ..reports import ContinualReport
from ..reports.html import continual_page
from ..runtime import check_format, check_output_folder, check_space, model_card, versions
from ..runtime.save import DENSE
from .commands import (
    DEFAULT_SAMPLES,
    UsageError,
    _check_counts,
    _checked,
    _describe,
    _device,
    _Evaluation,
    _load,
    _next_steps,
    _say,
    _what_to_prune,
    _window_length,
)

BUILTIN = "builtin:"


def continual_command(arguments: argparse.Namespace) -> None:
    """Prune a model for several texts, and leave its folder complete: weights, tokenizer, `report.json` and model card."""
    method, pattern, patterns = _checked(lambda: _what_to_prune(arguments))
    _checked(lambda: check_adds_up(method, arguments.strategy))
    _checked(lambda: check_format(arguments.format))
    texts = _checked(lambda: _texts_to_evaluate(arguments))
    out = Path(arguments.out).expanduser()
    _checked(lambda: check_output_folder(out))
    device = _checked(lambda: _device(arguments.device))
    _checked(lambda: _check_counts(arguments, ("samples", "length", "windows", "batch_size")))
    _checked(lambda: check_seed(arguments.seed))
    _checked(check_isa)

    _say(f"loading {arguments.model}")
    model, tokenizer = _load(arguments, device)
    check_space(model, out)
    samples, length = arguments.samples or DEFAULT_SAMPLES, _window_length(arguments.length, model)
    evaluation = {source: _Evaluation(arguments, model, tokenizer, text) for source, text in texts.items()}
    calibrations = {
        source: calibration_ids(source, tokenizer, samples=samples, length=length, seed=arguments.seed)
        for source in arguments.calibration
    }
    report = prune_continually(
        model,
        calibrations,
        method,
        pattern,
        {source: of.tokens for source, of in evaluation.items()},
        arguments.state,
        arguments.seed,
        resume=arguments.resume,
        abandon=arguments.abandon,
        strategy=arguments.strategy,
        include=arguments.include,
        exclude=arguments.exclude,
        patterns=patterns,
        batch_size=arguments.batch_size,
        length=_window_length(None, model),
        out=out,
        format=arguments.format,
    )
    tokenizer.save_pretrained(out)
    settings = {
        "model": arguments.model,
        "method": f"{_describe(method)}, {arguments.strategy}",
        "pattern": str(pattern),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": f"{samples} x {length} tokens each of {', '.join(report.names)}, one after another",
    }
    packed = arguments.format != DENSE
    _complete(model, out, report, settings, shlex.join(arguments.command_line), packed)
    print(f"\n{report}")
    for of in evaluation.values():
        print(f"evaluated on {of.description}")
    print(_next_steps(out, packed))


def _complete(
    model: torch.nn.Module, out: Path, report: ContinualReport, settings: dict[str, object], command: str, packed: bool
) -> None:
    results = {f"perplexity, {name}": value for name, value in report.steps[-1].perplexity.items()}
    results |= {"average perplexity": report.average_perplexity, "backward transfer": report.backward_transfer}
    results = {name: value for name, value in results.items() if value is not None}
    card = model_card(model, packed=packed, command=command, results=results, settings=settings)
    (out / "README.md").write_text(card, encoding="utf-8")
    whole = {"command": command, **report.to_dict(), "versions": versions()}
    (out / "report.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(continual_page(whole), encoding="utf-8")


def _texts_to_evaluate(arguments: argparse.Namespace) -> dict[str, str]:
    """The text to evaluate each data set on."""
    sources = arguments.calibration
    for source in sources:
        if sources.count(source) > 1:
            raise UsageError(f"calibration: {source} is given twice")
    if arguments.report_error:
        raise UsageError("report-error: not with more than one --calibration, nor with --state")
    for name in ("resume", "abandon"):
        if getattr(arguments, name) and not arguments.state:
            raise UsageError(f"{name}: expected --state, the folder of the run to go on with")
    if arguments.resume and arguments.abandon:
        raise UsageError("abandon: expected it without --resume, which goes on with the unfinished step")
    if not arguments.evaluate:
        return {}
    texts = arguments.text or [source for source in sources if source.startswith(BUILTIN)]
    if len(texts) != len(sources):
        raise UsageError("text: expected one --text for each --calibration, in the same order, to evaluate each data set on")
    return dict(zip(sources, texts, strict=True))
