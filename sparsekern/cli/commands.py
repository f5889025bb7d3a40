"""What `sparsekern prune`, `eval` and `bench` do, once the command line is read."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..backends.libraries import check_isa
from ..data import calibration_ids, encode, perplexity, read_documents, sentence_batches
from ..measure.compare import compare
from ..methods import Method
from ..models.load import DTYPES, load, load_tokenizer
from ..pattern import Pattern, parse_pattern
from ..pruning import check_seed, prune
from ..pruning.removal.loop import encoder_to_cut
from ..reports import Report, StructuredReport
from ..reports.html import html_page
from ..runtime import check_format, check_output_folder, check_space, count_zeros, model_card, versions
from ..runtime.formats import format_of
from ..runtime.packing import AUTO, is_packed, packed_copy, unpacked_copy
from ..runtime.save import DENSE
from .settings import configured

DEFAULT_LENGTH = 2048
DEFAULT_SAMPLES = 128
DEFAULT_SENTENCES = 1024
DEFAULT_TEXT = "builtin:python-docs"
METHOD_SETTINGS = ("damping", "block_size", "scope", "form", "units", "solver", "budget")
TRAINING_SETTINGS = ("criterion", "steps", "epochs", "train_steps", "batch_tokens", "learning_rate", "weight_decay")


class UsageError(Exception):
    """The command line asks for something that cannot be; found before any work is done."""


def prune_command(arguments: argparse.Namespace) -> None:
    """Prune a model and leave its folder complete: weights, tokenizer, reports and model card."""
    (source,), text = arguments.calibration, _checked(lambda: _only_text(arguments))
    method, pattern, patterns = _checked(lambda: _what_to_prune(arguments))
    _checked(lambda: check_format(arguments.format))
    out = Path(arguments.out).expanduser()
    _checked(lambda: _check_out(out, arguments.resume))
    device = _checked(lambda: _device(arguments.device))
    _checked(lambda: _check_counts(arguments, ("samples", "length", "windows", "batch_size")))
    _checked(lambda: check_seed(arguments.seed))
    _checked(check_isa)

    start = time.perf_counter()
    _say(f"loading {arguments.model}")
    model, tokenizer = _load(arguments, device)
    check_space(model, out, copies=1 if arguments.resume else 2)  # the finished blocks, and the model
    if method.removes_units:
        encoder_to_cut(model)  # for what it refuses: text is made sentences only for a model that can be pruned by them
    length = _window_length(arguments.length, model)
    evaluation = _Evaluation(arguments, model, tokenizer, text) if arguments.evaluate else None
    calibration, described = _calibration(arguments, source, method, tokenizer, length)
    seconds = {"load": time.perf_counter() - start}
    results: dict[str, object] = {}
    if evaluation:
        results["perplexity, dense"] = evaluation.perplexity()

    settings = {
        "model": arguments.model,
        "method": _describe(method),
        "pattern": str(pattern),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if described:
        settings["calibration"] = f"{described} of {source}, seed {arguments.seed}"

    def complete(report: Report) -> None:
        if evaluation:
            results["perplexity, pruned"] = evaluation.perplexity()
            results["evaluated on"] = evaluation.description
        results.update(_units_removed(report) if method.removes_units else _zeros(model, report))
        results["weights"] = (
            f"{report.bytes['dense'] / 1e6:,.1f} MB, saved {arguments.format} in {report.bytes['saved'] / 1e6:,.1f} MB"
        )
        command = shlex.join(arguments.command_line)
        tokenizer.save_pretrained(out)
        card = model_card(model, packed=arguments.format != DENSE, command=command, results=results, settings=settings)
        (out / "README.md").write_text(card, encoding="utf-8")
        whole = {"command": command, "versions": versions(), "results": results, **report.to_dict()}
        (out / "report.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / "report.html").write_text(html_page(whole), encoding="utf-8")

    report = prune(
        model,
        method,
        pattern,
        calibration,
        seed=arguments.seed,
        out=out,
        resume=arguments.resume,
        include=arguments.include,
        exclude=arguments.exclude,
        patterns=patterns,
        batch_size=arguments.batch_size,
        report_error=arguments.report_error,
        format=arguments.format,
        complete=complete,
    )
    seconds |= {f"prune: {phase}": taken for phase, taken in report.seconds.items() if phase != "total"}
    if evaluation:
        seconds["evaluate"] = evaluation.seconds
    seconds["total"] = time.perf_counter() - start
    print(_summary(settings, results, seconds))
    if method.removes_units:
        print(f"\nsaved to {out}; to use it: sparsekern.load({str(out)!r})\n")
    else:
        print(_next_steps(out, packed=arguments.format != DENSE))
    print(f"what each layer came to: {out / 'report.html'}")


def eval_command(arguments: argparse.Namespace) -> None:
    """Print the perplexity of a model and the share of zeros in its weights."""
    device = _checked(lambda: _device(arguments.device))
    _checked(lambda: _check_counts(arguments, ("length", "windows")))
    _say(f"loading {arguments.model}")
    model, tokenizer = _load(arguments, device)
    evaluation = _Evaluation(arguments, model, tokenizer, arguments.text)
    result = evaluation.perplexity()
    print(f"perplexity {result:.4f}  ({evaluation.description})")
    zeros, total = count_zeros(model)
    print(f"zeros      {zeros / total:.2%} of all {total / 1e6:,.1f} M weights")


def bench_command(arguments: argparse.Namespace) -> None:
    """Print what packing gains: size, memory and speed of the packed model against the dense one."""
    if arguments.format != AUTO:
        _checked(lambda: format_of(arguments.format))
    device = _checked(lambda: _device(arguments.device))
    _checked(lambda: _check_counts(arguments, ("tokens", "prompt_length", "rounds")))
    _checked(lambda: _check_plot(arguments.plot))
    _say(f"loading {arguments.model}")
    model = _load_model(arguments, device)
    dense = unpacked_copy(model) if is_packed(model) else model
    packed = model if is_packed(model) and arguments.format == AUTO else packed_copy(dense, arguments.format)
    comparison = compare(
        dense,
        packed,
        prompt_length=arguments.prompt_length,
        tokens=arguments.tokens,
        rounds=arguments.rounds,
        resident=not arguments.no_rss,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(json.dumps(comparison.to_dict(), indent=2) if arguments.json else comparison)
    if arguments.plot:
        Path(arguments.plot).write_text(comparison.to_svg() + "\n", encoding="utf-8")


class _Evaluation:
    """The held-out text, tokenized once; so that a text that is too short is found before the work."""

    def __init__(self, arguments: argparse.Namespace, model: torch.nn.Module, tokenizer, text: str) -> None:
        self.model, self.length, self.seconds = model, _window_length(arguments.length, model), 0.0
        if arguments.name == "prune":  # there, --length is that of the calibration windows
            self.length = _window_length(None, model)
        tokens = encode(read_documents(text, "held-out"), tokenizer)
        windows = len(tokens) // self.length
        if windows == 0:
            raise ValueError(f"text: {text} has {len(tokens)} tokens; one window of length {self.length} needs {self.length}")
        windows = min(windows, arguments.windows or windows)
        self.tokens = tokens[: windows * self.length]
        part = "the held-out part of " if text.startswith("builtin:") else ""
        self.description = f"{windows} x {self.length} tokens of {part}{text}"

    def perplexity(self) -> float:
        start = time.perf_counter()
        result = perplexity(self.model, self.tokens, self.length, progress=True)
        self.seconds += time.perf_counter() - start
        return result


def _checked(check: Callable):
    """What a wrong argument raises here is the caller's mistake, not a failure of the work."""
    try:
        return check()
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def _what_to_prune(arguments: argparse.Namespace) -> tuple[Method, Pattern, dict[str, Pattern | None]]:
    options = {
        name: getattr(arguments, name) for name in (*METHOD_SETTINGS, *TRAINING_SETTINGS) if getattr(arguments, name) is not None
    }
    method = configured(arguments.method, options, arguments.set)
    patterns = {}
    for assignment in arguments.layer_pattern:
        glob, separator, value = assignment.rpartition("=")
        if not separator or not glob:
            raise ValueError(f"layer-pattern: expected GLOB=PATTERN, got {assignment!r}")
        patterns[glob] = None if value == "dense" else parse_pattern(value)
    pattern = parse_pattern(arguments.pattern)
    if method.removes_units:
        method.share(pattern)
        if arguments.evaluate:
            raise ValueError(f"evaluate: perplexity is of causal language models, which {arguments.method} does not prune")
    return method, pattern, patterns


def _calibration(arguments: argparse.Namespace, source: str, method: Method, tokenizer, length: int) -> tuple[object, str]:
    """What the method is calibrated on, and how much that is: sentences for encoders, windows of running text for decoders."""
    seed = arguments.seed
    if method.removes_units:
        samples = arguments.samples or DEFAULT_SENTENCES
        batches = sentence_batches(source, tokenizer, samples=samples, length=length, seed=seed)
        return batches, f"{sum(len(batch['input_ids']) for batch in batches)} sentences"
    if method.statistic is None and not method.trains and not arguments.report_error:
        return None, ""
    ids = calibration_ids(source, tokenizer, samples=arguments.samples or DEFAULT_SAMPLES, length=length, seed=seed)
    return ids, f"{len(ids)} x {length} tokens"


def _only_text(arguments: argparse.Namespace) -> str:
    texts = arguments.text or [DEFAULT_TEXT]
    if len(texts) > 1:
        raise ValueError(f"text: expected one --text for one --calibration, got {len(texts)}")
    if arguments.strategy != "accumulate":
        raise ValueError("strategy: expected more than one --calibration, or --state, for another than 'accumulate'")
    if arguments.abandon:
        raise ValueError("abandon: expected --state, the folder with the unfinished step")
    return texts[0]


def _check_out(out: Path, resume: bool) -> None:
    if not (out / "checkpoint").is_dir():
        check_output_folder(out)
    elif not resume:
        raise ValueError(f"out: {out} holds an unfinished run; go on with it by --resume, or remove it")


def _check_counts(arguments: argparse.Namespace, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    if arguments.dtype != "auto" and arguments.dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {arguments.dtype!r}")


def _check_plot(plot: str | None) -> None:
    if plot is None:
        return
    if not plot.endswith(".svg"):
        raise ValueError(f"plot: expected a file name that ends in .svg, got {plot!r}")
    if not Path(plot).parent.is_dir():
        raise ValueError(f"plot: there is no folder {str(Path(plot).parent)!r} to put {Path(plot).name!r} in")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


def _load(arguments: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, object]:
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    return _load_model(arguments, device), tokenizer


def _load_model(arguments: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    from transformers.utils import logging

    logging.disable_progress_bar()
    return load(arguments.model, dtype=arguments.dtype, device=device, trust_remote_code=arguments.trust_remote_code)


def _window_length(length: int | None, model: torch.nn.Module) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if length is None:
        return min(DEFAULT_LENGTH, positions)
    if length > positions:
        raise ValueError(f"length: expected at most {positions}, the positions of this model, got {length}")
    return length


def _zeros(model: torch.nn.Module, report: Report) -> dict[str, str]:
    zeros, total = count_zeros(model)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    return {
        "zeros in the pruned linears": f"{report.sparsity:.2%} of {weights / 1e6:,.1f} M weights in {len(report.layers)} layers",
        "zeros in the whole model": f"{zeros / total:.2%} of {total / 1e6:,.1f} M weights",
    }


def _units_removed(report: StructuredReport) -> dict[str, str]:
    removed = {"FLOPs": report.flops_removed, "parameters": report.sparsity}
    kept = {
        kind: "kept " + ", ".join(str(layer.kept) for layer in report.layers if layer.kind == kind) for kind in ("heads", "neurons")
    }
    before, after = report.model_parameters
    return {
        **{f"{what} of heads and neurons": f"{share:.2%} removed" for what, share in removed.items()},
        **{f"{kind}, layer by layer": counts for kind, counts in kept.items()},
        "parameters of the whole model": f"{after / 1e6:,.2f} M of {before / 1e6:,.2f} M",
    }


def _summary(settings: dict[str, object], results: dict[str, object], seconds: dict[str, float]) -> str:
    rows = [(name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in (settings | results).items()]
    timings = [(f"seconds, {phase}", f"{taken:.1f}") for phase, taken in seconds.items()]
    width = max(len(name) for name, _ in rows + timings)
    rule = "-" * (width + 2 + max(len(value) for _, value in rows + timings))
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["", rule, *lines, rule, *(f"{name:<{width}}  {value:>8}" for name, value in timings), rule])


def _describe(method: Method) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in method.settings().items() if name != "name" and value is not None)
    return f"{method.name} ({settings})" if settings else method.name


def _next_steps(out: Path, packed: bool) -> str:
    folder = str(out)
    first = "import sparsekern\n  " if packed else ""
    return f"""
saved to {folder}; to use it:

  {first}from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained({folder!r})
  tokenizer = AutoTokenizer.from_pretrained({folder!r})
  prompt = tokenizer("The capital of France is", return_tensors="pt")
  output = model.generate(**prompt, max_new_tokens=20)
  print(tokenizer.decode(output[0]))
"""


def _say(what: str) -> None:
    print(f"{what} …", file=sys.stderr, flush=True)
