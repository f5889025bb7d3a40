"""`sparsekern eval`: the perplexity of a model and the share of zeros in its weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from ..runtime import count_zeros
from .common import HeldOutText, load_model, load_tokenizer_of


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Return the work. Nothing can be checked before the model is loaded."""
    return partial(_evaluate, arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer_of(arguments)
    model = load_model(arguments)
    text = HeldOutText(arguments.text, model, tokenizer, length=arguments.length, windows=arguments.windows)
    print(f"perplexity {text.perplexity(model, arguments.max_memory):.4f}  ({text.description})")
    zeros, total = count_zeros(model)
    print(f"zeros      {zeros / total:.2%} of all {total / 1e6:,.1f} M weights")
