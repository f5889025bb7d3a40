"""`sparsekern prune` for one text, or without any: prune a model and leave its folder complete."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..backends.libraries import check_isa
from ..data import as_calibration, describe_calibration
from ..methods import ExpertMethod, Method, RemovalMethod
from ..models.limits import window_length
from ..pattern import Pattern
from ..pruning import prune
from ..pruning.removal.loop import encoder_to_cut
from ..pruning.saving import check_out, described, is_finished, rewrite_reports
from ..ranks import World
from ..runtime.save import DENSE
from .common import (
    DEFAULT_PATTERN,
    DEFAULT_TEXT,
    HeldOutText,
    check_push_option,
    load_model,
    load_tokenizer_of,
    next_steps,
    push_result,
)
from .settings import asked_settings, methods_of, take_quality, training_of


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check a command line as far as possible without a model, and return the work.

    Raises:
        ValueError: options contradict each other, or the method does not accept its settings.
        OSError: the output folder cannot be written to.
    """
    take_quality(arguments)
    (source,) = arguments.calibration
    text = _only_text(arguments)
    method, then = methods_of(arguments)
    pattern = _pattern(arguments, method, then)
    if isinstance(method, RemovalMethod) and arguments.evaluate:
        raise ValueError(f"--evaluate: perplexity is of causal language models, which {method.name} does not prune")
    if World.current().leads:
        check_out(arguments.out, "--out", resume=arguments.resume)
        check_push_option(arguments)
    check_isa()
    return partial(_prune, arguments, method, then, pattern, source, text)


def interrupted_hint(arguments: argparse.Namespace) -> str:
    """Return what to do after Ctrl-C."""
    if is_finished(arguments.out):
        return f"the pruned model is complete in {arguments.out}, and sparsekern eval takes its perplexity"
    return "run the same command with --resume to go on"


def _pattern(arguments: argparse.Namespace, method: Method, then: Method | None) -> Pattern | None:
    """Return the requested pattern, 2:4 by default, or None where only heads, neurons or experts are removed.

    Raises:
        ValueError: a pattern is given for such a method.
    """
    if then is not None or not isinstance(method, (RemovalMethod, ExpertMethod)):
        return arguments.pattern or DEFAULT_PATTERN
    if arguments.pattern is not None:
        what, more = (
            ("experts", ", unless --then names another method") if isinstance(method, ExpertMethod) else ("heads and neurons", "")
        )
        raise ValueError(f"--pattern: expected none, since {method.name} removes a share of {what}, given by --remove{more}")
    return None


def _prune(
    arguments: argparse.Namespace, method: Method, then: Method | None, pattern: Pattern | None, source: str, text: str
) -> None:
    start, out = time.perf_counter(), arguments.out
    tokenizer = load_tokenizer_of(arguments, needed=_takes_text(arguments, method) or arguments.evaluate)
    model = load_model(arguments)
    if isinstance(method, RemovalMethod):
        encoder_to_cut(model)  # raises for a model that cannot be pruned, before the text is split
    window_length(model, arguments.length)  # raises for a bad length before the text is read
    held_out = HeldOutText(text, model, tokenizer, length=None, windows=arguments.windows) if arguments.evaluate else None
    calibration, amount = _calibration(arguments, source, method, model, tokenizer)
    seconds = {"load": time.perf_counter() - start}
    results: dict[str, float | str] = {}
    if held_out:
        results["perplexity, dense"] = held_out.perplexity(model, arguments.max_memory)

    settings = {
        "model": arguments.model,
        "method": described(method.settings()),
        **({} if then is None else {"then": described(then.settings())}),
        **({} if pattern is None else {"pattern": str(pattern)}),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if amount:
        settings["calibration"] = f"{amount} of {source}, seed {arguments.seed}"

    tune, distill = training_of(arguments)
    report = prune(
        model,
        method,
        pattern,
        calibration,
        tokenizer=tokenizer,
        seed=arguments.seed,
        out=out,
        resume=arguments.resume,
        include=arguments.include,
        exclude=arguments.exclude,
        patterns=dict(arguments.pattern_for),
        batch_size=arguments.batch_size,
        report_error=arguments.report_error,
        weighting=arguments.weighting,
        unseen=arguments.unseen,
        format=arguments.format,
        then=then,
        max_memory=arguments.max_memory,
        leaves=arguments.leaves,
        correction=arguments.correction,
        tune=tune,
        distill=distill,
        allocation=arguments.allocation,
        quality=arguments.quality,
        values=arguments.values,
    )
    if held_out:
        results["perplexity, pruned"] = held_out.perplexity(model, arguments.max_memory)
        results["evaluated on"] = held_out.description
    if not World.current().leads:
        return
    report.command, report.measured = shlex.join(arguments.command_line), report.measured | results
    shown = rewrite_reports(out, model, report, format=arguments.format, settings=settings)
    seconds |= {f"prune: {phase}": taken for phase, taken in report.seconds.items() if phase != "total"}
    if held_out:
        seconds["evaluate"] = held_out.seconds
    seconds["total"] = time.perf_counter() - start
    print(_summary(settings, shown, seconds))
    if isinstance(method, RemovalMethod):
        print(f"\nsaved to {out}; to use it: sparsekern.load({str(out)!r})\n")
    else:
        print(next_steps(model, out, packed=arguments.format != DENSE))
    print(f"each layer's result: {out / 'report.html'}")
    push_result(arguments)


def _calibration(
    arguments: argparse.Namespace, source: str, method: Method, model: torch.nn.Module, tokenizer: Any
) -> tuple[Any, str]:
    """Return the calibration data and their amount in words: sentences for encoders, windows of text for decoders."""
    sentences = isinstance(method, RemovalMethod)
    if not _takes_text(arguments, method):
        return None, ""
    options = {"samples": arguments.samples, "length": arguments.length, "seed": arguments.seed}
    text = as_calibration(source, tokenizer=tokenizer, sentences=sentences, progress=World.current().leads, **options)
    return text, describe_calibration(text.read(model))


def _takes_text(arguments: argparse.Namespace, method: Method) -> bool:
    """Return whether the run needs calibration text."""
    return bool(method.needs_data or arguments.report_error or asked_settings(arguments))


def _only_text(arguments: argparse.Namespace) -> str:
    texts = arguments.text or [DEFAULT_TEXT]
    if len(texts) > 1:
        raise ValueError(f"--text: expected one for one --calibration, got {len(texts)}")
    if arguments.strategy != "accumulate":
        raise ValueError("--strategy: expected more than one --calibration, or --state, for another than 'accumulate'")
    if arguments.abandon:
        raise ValueError("--abandon: expected --state, the folder with the unfinished step")
    return texts[0]


def _summary(settings: dict[str, object], results: dict[str, object], seconds: dict[str, float]) -> str:
    rows = [(name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in (settings | results).items()]
    timings = [(f"seconds, {phase}", f"{taken:.1f}") for phase, taken in seconds.items()]
    width = max(len(name) for name, _ in rows + timings)
    rule = "-" * (width + 2 + max(len(value) for _, value in rows + timings))
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["", rule, *lines, rule, *(f"{name:<{width}}  {value:>8}" for name, value in timings), rule])
