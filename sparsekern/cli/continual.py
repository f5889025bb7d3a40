"""`sparsekern prune` with more than one `--calibration` or with `--state`: one dataset after another."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from functools import partial

from ..backends.libraries import check_isa
from ..data import as_calibration, describe_calibration
from ..methods import Method
from ..models.limits import window_length
from ..pruning import prune_continually
from ..pruning.continual.prune import check_adds_up
from ..pruning.saving import check_new_out, described, rewrite_reports
from ..ranks import World
from ..runtime.save import DENSE
from .common import (
    DEFAULT_PATTERN,
    HeldOutText,
    check_push_option,
    load_model,
    load_tokenizer_of,
    next_steps,
    push_result,
)
from .settings import asked_settings, methods_of, take_quality

BUILTIN = "builtin:"


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check a command line as far as possible without a model, and return the work.

    Raises:
        ValueError: options contradict each other, or the method takes a single dataset only.
        OSError: the output folder cannot be written to.
    """
    take_quality(arguments)
    method, _ = methods_of(arguments)  # of those that add up, none takes another one behind it
    check_adds_up(method, arguments.strategy)
    for option, value in asked_settings(arguments).items():
        shown = "" if value is True else f", got {value!r}"
        raise ValueError(f"--{option}: expected one --calibration and no --state{shown}")
    texts = _texts_to_evaluate(arguments)
    if World.current().leads:
        check_new_out(arguments.out, "--out")
    check_push_option(arguments)
    check_isa()
    return partial(_prune, arguments, method, texts)


def interrupted_hint(arguments: argparse.Namespace) -> str:
    """Return what to do after Ctrl-C: only a state is gone on with."""
    if not arguments.state:
        return "nothing was kept; with --state DIR a run can be resumed"
    instead = " in place of --abandon" if arguments.abandon else ""
    return f"run the same command with --resume{instead} to go on"


def _prune(arguments: argparse.Namespace, method: Method, texts: dict[str, str]) -> None:
    out, pattern = arguments.out, arguments.pattern or DEFAULT_PATTERN
    tokenizer = load_tokenizer_of(arguments)
    model = load_model(arguments)
    window_length(model, arguments.length)  # raises for a bad length before any text is read
    held_out = {
        source: HeldOutText(text, model, tokenizer, length=None, windows=arguments.windows) for source, text in texts.items()
    }
    options = {"tokenizer": tokenizer, "samples": arguments.samples, "length": arguments.length, "seed": arguments.seed}
    options["progress"] = World.current().leads
    calibrations = {source: as_calibration(source, **options).read(model) for source in arguments.calibration}
    amount = describe_calibration(next(iter(calibrations.values())))
    report = prune_continually(
        model,
        calibrations,
        method,
        pattern,
        tokenizer=tokenizer,
        evaluate={source: of.tokens for source, of in held_out.items()},
        state=arguments.state,
        seed=arguments.seed,
        resume=arguments.resume,
        abandon=arguments.abandon,
        strategy=arguments.strategy,
        include=arguments.include,
        exclude=arguments.exclude,
        patterns=dict(arguments.pattern_for),
        batch_size=arguments.batch_size,
        weighting=arguments.weighting,
        unseen=arguments.unseen,
        length=window_length(model) if held_out else None,
        out=out,
        format=arguments.format,
        leaves=arguments.leaves,
        max_memory=arguments.max_memory,
    )
    if not World.current().leads:
        return
    settings = {
        "model": arguments.model,
        "method": f"{described(method.settings())}, {arguments.strategy}",
        "pattern": str(pattern),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": f"{amount} each of {', '.join(report.names)}, one after another",
    }
    report.command = shlex.join(arguments.command_line)
    rewrite_reports(out, model, report, format=arguments.format, settings=settings)
    print(f"\n{report}")
    for of in held_out.values():
        print(f"evaluated on {of.description}")
    print(next_steps(model, out, packed=arguments.format != DENSE))
    push_result(arguments)


def _texts_to_evaluate(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the evaluation text of each dataset, or none without `--evaluate`."""
    sources = arguments.calibration
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"--calibration: {source} is given twice")
    if arguments.report_error:
        raise ValueError("--report-error: expected one --calibration and no --state")
    for name in ("resume", "abandon"):
        if getattr(arguments, name) and not arguments.state:
            raise ValueError(f"--{name}: expected --state, the folder of the run to continue")
    if arguments.resume and arguments.abandon:
        raise ValueError("--abandon: expected no --resume with it, which continues the unfinished step")
    if not arguments.evaluate:
        return {}
    texts = arguments.text or [source for source in sources if source.startswith(BUILTIN)]
    if len(texts) != len(sources):
        raise ValueError("--text: expected one for each --calibration, in the same order, to evaluate each dataset")
    return dict(zip(sources, texts, strict=True))
