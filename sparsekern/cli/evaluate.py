"""`sparsekern eval`: a model's perplexity, how close it is to another, its scores in tasks, and the share of zeros in its weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..measure.tasks import Tasks, check_harness, measured
from ..pruning.saving import check_finished, record
from ..runtime import count_zeros
from .common import DEFAULT_TEXT, HeldOutText, load_model, load_tokenizer_of, say
from .ranks import ranks


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check a command line as far as possible without a model, and return the work.

    Raises:
        ImportError: tasks are asked for, and lm-evaluation-harness is not installed.
        ValueError: options contradict each other.
        FileExistsError: results are to be recorded in a folder that `sparsekern prune` did not write.
    """
    if arguments.tasks:
        check_harness()
        if arguments.stream or ranks() > 1:
            raise ValueError("--tasks: expected one process and no --stream, since each batch runs the whole model")
    elif arguments.examples is not None:
        raise ValueError("--examples: expected --tasks, whose examples they are")
    if arguments.record:
        check_finished(Path(arguments.model), "--record")
    return partial(_evaluate, arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    tasks = _tasks(arguments)
    tokenizer = load_tokenizer_of(arguments)
    model = load_model(arguments)
    results: dict[str, float | str] = {}
    if arguments.text is not None or arguments.against is not None or tasks is None:
        text = HeldOutText(arguments.text or DEFAULT_TEXT, model, tokenizer, length=arguments.length, windows=arguments.windows)
        if arguments.against is None:
            results["perplexity, pruned"] = text.perplexity(model, arguments.max_memory)
            print(f"perplexity {results['perplexity, pruned']:.4f}  ({text.description})")
        else:
            found = text.fidelity(model, load_model(arguments, arguments.against), arguments.max_memory)
            results |= found.measured()
            print(f"perplexity {found.perplexity:.4f}, of {arguments.against} {found.dense_perplexity:.4f}  ({text.description})")
            print(f"divergence {found.divergence:.4f} nats a token, same top token {found.agreement:.2%}")
        results["evaluated on"] = text.description
    if tasks is not None:
        scores = tasks.evaluate(model, tokenizer, batch_size=arguments.batch_size or 8, examples=arguments.examples)
        print(*scores, sep="\n")
        results |= measured(scores)
    zeros, total = count_zeros(model)
    print(f"zeros      {zeros / total:.2%} of all {total / 1e6:,.1f} M weights")
    if arguments.record:
        record(arguments.model, results)
        print(f"recorded in {Path(arguments.model)}: report.json, report.html and README.md")


def _tasks(arguments: argparse.Namespace) -> Tasks | None:
    if not arguments.tasks:
        return None
    say(f"loading the data of {', '.join(arguments.tasks)}")
    return Tasks(arguments.tasks)
