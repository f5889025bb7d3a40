"""The command line: `sparsekern prune | eval | bench | info`. Exit code 0: done; 1: it failed; 2: it was called wrongly."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Sequence

from tqdm import tqdm

from .._info import info
from .._version import __version__
from .._warnings import SparsekernWarning
from .commands import DEFAULT_TEXT, UsageError, bench_command, eval_command, prune_command
from .continual import continual_command

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. `argv` without the program's name; None takes the process's own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    arguments.command_line = ["sparsekern", *argv]
    with warnings.catch_warnings():
        warnings.simplefilter("always", SparsekernWarning)
        warnings.showwarning = _show_warning
        try:
            arguments.run(arguments)
        except KeyboardInterrupt:
            hint = "; run the same command with --resume to go on" if arguments.name == "prune" else ""
            print(f"sparsekern {arguments.name}: interrupted{hint}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:  # the boundary of the program: what is said to a person instead of a traceback
            if arguments.debug:
                traceback.print_exc()
            else:
                print(f"sparsekern {arguments.name}: error: {_one_line(error)}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
    return 0


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__} (--debug shows where)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{lines[0]} ({error.filename})"
    return lines[0]


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    place = "" if issubclass(category, SparsekernWarning) else f"{filename}:{lineno}: "
    tqdm.write(f"warning: {place}{message}", file=sys.stderr)  # beside a progress bar, not into it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if isinstance(action.default, (str, int)) and action.default else action.help


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparsekern", description="Prune pretrained transformers, fast.")
    parser.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="prune | eval | bench | info")
    _add_prune(commands)
    _add_eval(commands)
    _add_bench(commands)
    about = commands.add_parser("info", help="what runs here, and for everything that does not, the reason")
    about.add_argument("--json", action="store_true", help="the same for a program to read")
    about.set_defaults(run=_run_info)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_prune(commands) -> None:
    prune = commands.add_parser("prune", help="prune a model and save it", formatter_class=_Help)
    _add_model(prune)
    prune.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the pruned model")
    prune.add_argument(
        "--method",
        default="sparsegpt",
        help="magnitude, random, structured, wanda, sparsegpt, alps, sparsellm, copal, gradual or kprune (encoders)",
    )
    prune.add_argument(
        "--pattern", default="2:4", help="N:M keeps N of every M inputs; 0.5 or 50%% is the share of zeros (kprune: to remove)"
    )
    prune.add_argument(
        "--layer-pattern",
        action="append",
        default=[],
        metavar="GLOB=PATTERN",
        help="for the linears that match; dense leaves them as they are; first match wins",
    )
    prune.add_argument("--include", action="append", metavar="GLOB", help="prune only linears that match")
    prune.add_argument("--exclude", action="append", metavar="GLOB", help="leave linears that match as they are")
    data = prune.add_argument_group("calibration")
    data.add_argument(
        "--calibration",
        action="append",
        metavar="SOURCE",
        help="a .txt, .jsonl or .parquet file, hf:NAME[:split], builtin:python-docs (the default) or builtin:python-source; given more "
        "than once, the model is pruned for one after another without keeping any (best with --method copal)",
    )
    data.add_argument("--state", metavar="DIR", help="what is known after these texts, to add others later by the same command")
    data.add_argument(
        "--abandon",
        action="store_true",
        help="drop the unfinished step in --state, whose text is lost or bad, and go on with these",
    )
    data.add_argument("--strategy", default="accumulate", help="with several texts: accumulate, dense (forgets) or carry (stasis)")
    data.add_argument("--samples", type=int, help="windows of text (default: 128), or for kprune sentences (default: 1024)")
    data.add_argument(
        "--length", type=int, help="tokens in a window (default: 2048, or the model's positions where they are fewer)"
    )
    data.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    data.add_argument("--batch-size", type=int, help="windows at once: a matter of speed and memory only")
    settings = prune.add_argument_group(
        "settings of the method", "Defaults are the paper's, but for alps' tolerance, sparsellm's keep and kprune's tune_bias."
    )
    settings.add_argument("--damping", type=float, help="share of the mean diagonal added to the Gram matrix")
    settings.add_argument("--block-size", type=int, help="columns in a block")
    settings.add_argument("--scope", help="where a sparsity is counted: block, row, matrix or (magnitude) global")
    settings.add_argument("--units", help="what structured prunes: both, heads or neurons")
    settings.add_argument("--budget", help="what kprune's --pattern is a share of: flops or parameters")
    settings.add_argument("--form", help="of copal's importance: sample or gram")
    settings.add_argument("--solver", help="what prunes each linear inside sparsellm: sparsegpt, alps, wanda or magnitude")
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting of the method's config, such as iterations=2, or solver.damping=0.1 of the method inside; may be repeated",
    )
    training = prune.add_argument_group("settings of gradual, which prunes in steps and trains on the calibration text after each")
    training.add_argument("--criterion", help="magnitude, random or structured; --scope and --units are then its own")
    training.add_argument("--steps", type=int, help="pruning steps")
    training.add_argument("--epochs", type=int, help="passes over the text after each step; 0 does not train")
    training.add_argument("--train-steps", type=int, help="optimizer steps after each pruning step, instead of epochs")
    training.add_argument("--batch-tokens", type=int, help="tokens in an optimizer step, at least")
    training.add_argument("--learning-rate", type=float, help="the highest, of AdamW")
    training.add_argument("--weight-decay", type=float, help="of matrices")
    prune.add_argument(
        "--report-error",
        action="store_true",
        help="report each layer's output error also for wanda and magnitude, which do without a Gram matrix (sparsegpt always does)",
    )
    prune.add_argument("--evaluate", action="store_true", help="perplexity before and after, on --text")
    prune.add_argument(
        "--text",
        action="append",
        metavar="SOURCE",
        help=f"text to evaluate on ({DEFAULT_TEXT}), one for each --calibration; of a built-in text, the part that calibration never sees",
    )
    _add_windows(prune)
    prune.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, or in --state")
    prune.add_argument(
        "--format",
        default="dense",
        help="dense: every loader takes it; packed: smaller and faster, loaded after `import sparsekern`; bitmask or N:M: packed so",
    )
    prune.set_defaults(run=_run_prune)


def _add_eval(commands) -> None:
    evaluate = commands.add_parser("eval", help="perplexity of a model", formatter_class=_Help)
    _add_model(evaluate)
    evaluate.add_argument(
        "--text",
        default=DEFAULT_TEXT,
        metavar="SOURCE",
        help="text to evaluate on; of a built-in text, the part that calibration never sees",
    )
    _add_windows(evaluate)
    evaluate.add_argument(
        "--length", type=int, help="tokens in a window (default: 2048, or the model's positions where they are fewer)"
    )
    evaluate.set_defaults(run=eval_command)


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="size and speed of a pruned model, packed against dense", formatter_class=_Help)
    _add_model(bench)
    bench.add_argument("--format", default="auto", help="auto: the smallest that each linear fits; bitmask or N:M: that one only")
    bench.add_argument("--prompt-length", type=int, default=128, metavar="N", help="tokens of the prompt")
    bench.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to generate, one at a time")
    bench.add_argument("--rounds", type=int, default=3, metavar="N", help="of timing; medians are shown")
    bench.add_argument(
        "--no-rss",
        action="store_true",
        help="leave out the resident memory, for which each model is saved to a temporary folder and loaded",
    )
    bench.add_argument("--json", action="store_true", help="the same for a program to read")
    bench.add_argument("--plot", metavar="FILE.svg", help="write the ratios as a plot, too")
    bench.set_defaults(run=bench_command)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a local folder, a .gguf file, a hub id or builtin:smollm2-135m")
    command.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    command.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, …")
    command.add_argument("--trust-remote-code", action="store_true", help="run model code that the checkpoint brings along")


def _add_windows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows only")


def _run_prune(arguments: argparse.Namespace) -> None:
    arguments.calibration = arguments.calibration or [DEFAULT_TEXT]
    several = len(arguments.calibration) > 1 or arguments.state is not None
    (continual_command if several else prune_command)(arguments)


def _run_info(arguments: argparse.Namespace) -> None:
    found = info()
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
