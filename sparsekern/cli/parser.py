"""The options of each command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from .._version import __version__
from ..export.gguf_tensors import AUTO, TYPES
from ..methods import INT4, METHODS
from ..methods.allocation import ALLOCATIONS, UNIFORM
from ..models.load import DTYPES
from ..pruning.continual.prune import STRATEGIES
from ..pruning.corrections import CORRECTIONS, NONE
from ..pruning.mixtures import EQUAL, MAGNITUDE, UNSEEN, WEIGHTINGS
from ..pruning.quality import DEFAULT_METHOD, PRESETS
from ..runtime.int8_head import HEADS
from . import types
from .settings import method_help

EVALUATED = "text to evaluate on (the held-out part of python-docs)"
LENGTH = "tokens in a window (2048, or the model's positions)"


class Parser(argparse.ArgumentParser):
    """A parser that prints errors in one line that names the option."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')} (see {self.prog} --help)\n")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24)


class _MethodHelp(argparse.Action):
    """An action that prints the settings of a method and exits, whatever other options are given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Print the settings of the method `values`."""
        print(method_help(values))
        parser.exit()


def make_parser() -> Parser:
    """Return the parser of the whole command line. It stores the command as `name`."""
    parser = Parser(prog="sparsekern", description="Prune pretrained transformers, fast.")
    parser.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="prune | eval | pack | bench | export | info")
    for add in (_add_prune, _add_eval, _add_pack, _add_bench, _add_export, _add_info):
        options = add(commands)
        options.add_argument("--debug", action="store_true", help="show the traceback of an error")
        options.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # who reads it knows
    return parser


def _add_command(commands, name: str, help: str, model: bool = False, usage: str = "") -> argparse._ArgumentGroup:
    """Add a command and return the group of its options, with MODEL if the command takes one."""
    usage = " ".join(filter(None, ("sparsekern", name, "MODEL" if model else "", usage, "[options]")))
    options = commands.add_parser(name, help=help, usage=usage, formatter_class=_Help, add_help=False).add_argument_group("options")
    if model:
        options.add_argument("model", metavar="MODEL", help="folder, .gguf file, hub id or builtin:smollm2-135m")
    return options


def _add_prune(commands) -> argparse._ArgumentGroup:
    options = _add_command(commands, "prune", "prune a model and save it", model=True, usage="--out DIR")
    options.add_argument("--out", required=True, type=types.path, metavar="DIR", help="new or empty folder for the pruned model")
    options.add_argument(
        "--format", default="dense", type=types.format_to_save, help="dense (default), packed (smaller), bitmask or N:M"
    )
    options.add_argument("--push-to-hub", metavar="REPO", help="push the finished folder to user/name on the hub")
    options.add_argument("--resume", action="store_true", help="continue the unfinished run in --out, or --state")
    _add_loading(options)
    _add_stream(options)
    prune = commands.choices["prune"]
    _add_choice_of_weights(options)
    texts = prune.add_argument_group("calibration and evaluation")
    _add_calibration(texts)
    texts.add_argument("--evaluate", action="store_true", help="measure perplexity before and after pruning")
    texts.add_argument("--text", action="append", metavar="SOURCE", help=EVALUATED)
    _add_windows(texts)
    texts.add_argument("--report-error", action="store_true", help="report layers' errors for wanda and magnitude too")
    return options


def _add_choice_of_weights(group) -> None:
    methods = types.one_of(sorted(METHODS))
    group.add_argument(
        "--method",
        type=methods,
        metavar="NAME",
        help=", ".join(f"[{name}]" if name == DEFAULT_METHOD else name for name in sorted(METHODS)),
    )
    group.add_argument(
        "--quality",
        type=types.one_of(PRESETS),
        metavar="NAME",
        help="fast (sparsegpt), good (alps, dense), best (trained)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        type=types.setting,
        metavar="NAME=VALUE",
        help="setting of the method, or tune.NAME, distill.NAME",
    )
    group.add_argument("--help-method", action=_MethodHelp, type=methods, metavar="NAME", help="list a method's settings and exit")
    group.add_argument("--remove", type=types.share, metavar="SHARE", help="share to remove (experts 0.25, kprune 0.5)")
    group.add_argument(
        "--then",
        type=methods,
        metavar="NAME",
        help="method for what experts leaves (--set then.NAME=VALUE)",
    )
    group.add_argument("--tune", action="store_true", help="tune each block afterwards (--set tune.NAME=VALUE)")
    group.add_argument("--distill", type=types.count, metavar="STEPS", help="train towards the dense model (--set distill.NAME=…)")
    group.add_argument("--pattern", type=types.pattern, help="N:M keeps N of M (2:4); 0.5 is the share of zeros")
    group.add_argument(
        "--pattern-for",
        action="append",
        default=[],
        type=types.pattern_for,
        metavar="GLOB=P",
        help="pattern of linears that match, or dense; first wins",
    )
    group.add_argument("--include", action="append", metavar="GLOB", help="prune only linears that match")
    group.add_argument("--exclude", action="append", metavar="GLOB", help="leave linears that match dense")
    _add_choice(group, "--unseen", UNSEEN, MAGNITUDE, "experts no token reached: magnitude, dense or error")


def _add_choice(group, option: str, names: Iterable[str], default: str, help: str) -> None:
    group.add_argument(option, default=default, type=types.one_of(names), metavar="NAME", help=help)


def _add_calibration(group) -> None:
    group.add_argument(
        "--calibration",
        action="append",
        metavar="SOURCE",
        help="text file, hf:NAME, builtin:NAME or self:200k; several",
    )
    group.add_argument("--samples", type=types.count, metavar="N", help="windows of text (128), sentences for kprune (1024)")
    group.add_argument("--length", type=types.count, metavar="N", help=LENGTH)
    group.add_argument("--seed", type=types.seed, default=0, metavar="N", help="seed of all random numbers (0)")
    group.add_argument(
        "--leaves",
        type=types.count,
        metavar="N",
        help="parts of sums (1; 8 for several processes)",
    )
    group.add_argument("--batch-size", type=types.count, metavar="N", help="windows at once: a matter of speed and memory")
    _add_choice(group, "--weighting", WEIGHTINGS, EQUAL, "weight of an expert's tokens: equal or routing")
    _add_choice(group, "--allocation", ALLOCATIONS, UNIFORM, "share of zeros by linear: uniform, fisher, mixed (N:M)")
    _add_choice(group, "--correction", CORRECTIONS, NONE, "for errors of earlier linears: none, sequential, dense")
    group.add_argument(
        "--values", type=types.one_of((INT4,)), metavar="NAME", help="int4: round what 2:4, 1:4 or 4:16 keeps to 4 bits"
    )
    group.add_argument("--state", type=types.path, metavar="DIR", help="folder for accumulated statistics, to add texts later")
    group.add_argument("--abandon", action="store_true", help="drop the unfinished step in --state first")
    _add_choice(group, "--strategy", STRATEGIES, "accumulate", "with several texts: accumulate, dense or carry")


def _add_eval(commands) -> argparse._ArgumentGroup:
    options = _add_command(
        commands, "eval", "measure the perplexity of a model, how close it is to another, or its scores in tasks", model=True
    )
    options.add_argument("--text", metavar="SOURCE", help=f"{EVALUATED}; without --tasks the default")
    options.add_argument("--against", metavar="DENSE", help="also compare the predictions with those of this model")
    options.add_argument(
        "--tasks", type=types.names, metavar="NAME,…", help="tasks of lm-evaluation-harness, or YAML files of tasks"
    )
    options.add_argument("--examples", type=types.count, metavar="N", help="the first N examples of each task only")
    options.add_argument("--batch-size", type=types.count, metavar="N", help="requests of tasks at once (8)")
    options.add_argument("--record", action="store_true", help="add the results to the report and card in MODEL, a pruned folder")
    _add_windows(options)
    options.add_argument("--length", type=types.count, metavar="N", help=LENGTH)
    _add_loading(options)
    _add_stream(options)
    return options


def _add_pack(commands) -> argparse._ArgumentGroup:
    options = _add_command(commands, "pack", "save a pruned model in a packed format", model=True, usage="--out DIR")
    options.add_argument("--out", required=True, type=types.path, metavar="DIR", help="new or empty folder for the packed model")
    _add_format_to_pack(options)
    options.add_argument(
        "--head", type=types.one_of(HEADS), metavar="NAME", help="int8: round the head to 8 bits, and embeddings tied to it"
    )
    options.add_argument("--push-to-hub", metavar="REPO", help="push the finished folder to user/name on the hub")
    options.add_argument("--overwrite", action="store_true", help="replace a model")
    _add_loading(options)
    options.add_argument("--stream", action="store_true", help="read the blocks one at a time, to save memory")
    return options


def _add_format_to_pack(options) -> None:
    options.add_argument(
        "--format", default="packed", type=types.format_to_pack, help="packed (default; each linear's smallest), bitmask, N:M"
    )


def _add_bench(commands) -> argparse._ArgumentGroup:
    options = _add_command(commands, "bench", "compare a packed model with the dense one", model=True)
    _add_format_to_pack(options)
    options.add_argument("--prompt-length", type=types.count, default=128, metavar="N", help="tokens of the prompt (128)")
    options.add_argument("--tokens", type=types.count, default=32, metavar="N", help="tokens to generate, one at a time (32)")
    options.add_argument("--rounds", type=types.count, default=3, metavar="N", help="rounds of timing; medians are shown (3)")
    options.add_argument("--no-rss", action="store_true", help="skip resident memory, which takes a copy of each model")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--plot", type=types.svg_file, metavar="FILE.svg", help="write the ratios as a plot, too")
    _add_loading(options)
    return options


def _add_export(commands) -> argparse._ArgumentGroup:
    options = _add_command(commands, "export", "write a model for llama.cpp", model=True, usage="--gguf FILE")
    options.add_argument("--gguf", required=True, type=types.path, metavar="FILE", help="the file, which ends in .gguf")
    _add_choice(
        options, "--type", TYPES, AUTO, "type of matrices without 4-bit values: auto (unchanged), f32, f16, bf16, q8_0 or q4_0"
    )
    options.add_argument("--no-tokenizer", action="store_true", help="write no vocabulary: such a file runs on token ids only")
    options.add_argument("--overwrite", action="store_true", help="replace a file")
    _add_loading(options)
    return options


def _add_info(commands) -> argparse._ArgumentGroup:
    options = _add_command(commands, "info", "list what runs here, and the reason for everything that does not")
    options.add_argument("--json", action="store_true", help="print JSON")
    return options


def _add_loading(options) -> None:
    dtypes = types.one_of(("auto", *DTYPES))
    options.add_argument("--dtype", default="auto", type=dtypes, help="auto (the checkpoint's), float32, bfloat16, float16")
    options.add_argument("--device", default="auto", type=types.device, help="auto (cuda where there is one), cpu, cuda, cuda:1")
    options.add_argument("--trust-remote-code", action="store_true", help="run model code that the checkpoint contains")


def _add_stream(options) -> None:
    options.add_argument("--stream", action="store_true", help="read the blocks one at a time, to save memory")
    options.add_argument("--max-memory", type=types.memory, metavar="SIZE", help="most memory with --stream, such as 8GB")


def _add_windows(group) -> None:
    group.add_argument("--windows", type=types.count, metavar="N", help="evaluate on the first N windows only")
