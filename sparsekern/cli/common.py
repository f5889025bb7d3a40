"""Functions that the commands share: loading, evaluation on held-out text, and messages."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import evaluation_ids, perplexity
from ..measure.fidelity import Fidelity, fidelity
from ..models.limits import window_length
from ..models.load import check_streamable, load, load_tokenizer
from ..pattern import NM
from ..runtime.card import CAUSAL, loader_of
from ..runtime.hub import check_push, push

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXT = "builtin:python-docs"
DEFAULT_PATTERN = NM(2, 4)
PUSH = "--push-to-hub"


class HeldOutText:
    """A text to evaluate on, tokenized before any work, so that one that is too short is found early.

    Attributes:
        tokens: `[windows, length]` int64.
        length: tokens in a window.
        description: the text and its windows in words, for reports.
        seconds: seconds spent on perplexities so far.
    """

    def __init__(self, source: str, model: torch.nn.Module, tokenizer: Any, *, length: int | None, windows: int | None) -> None:
        self.length, self.seconds = window_length(model, length), 0.0
        self.tokens = evaluation_ids(source, tokenizer, self.length, windows=windows)
        part = "the held-out part of " if source.startswith("builtin:") else ""
        self.description = f"{len(self.tokens)} x {self.length} tokens of {part}{source}"

    def perplexity(self, model: torch.nn.Module, max_memory: int | None = None) -> float:
        """Return the perplexity of `model`, with a progress bar."""
        start = time.perf_counter()
        result = perplexity(model, self.tokens, self.length, progress=True, max_memory=max_memory)
        self.seconds += time.perf_counter() - start
        return result

    def fidelity(self, model: torch.nn.Module, dense: torch.nn.Module, max_memory: int | None = None) -> Fidelity:
        """Return how close `model` is to `dense` on the text, with a progress bar."""
        return fidelity(model, dense, self.tokens, self.length, progress=True, max_memory=max_memory)


def load_model(arguments: argparse.Namespace, name: str | None = None) -> torch.nn.Module:
    """Print a message and load the model that the command line names, or another one in the same way."""
    name = arguments.model if name is None else name
    stream = getattr(arguments, "stream", False)
    if getattr(arguments, "max_memory", None) and not stream:
        raise ValueError("--max-memory: expected --stream, since a model in memory takes what it takes")
    say(f"loading {name}")
    with _bars_of_tensors_hidden():
        return load(
            name,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            stream=stream,
        )


def load_tokenizer_of(arguments: argparse.Namespace, *, needed: bool = True) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the model that the command line names.

    Args:
        arguments: the command line.
        needed: whether a text is read. If not, a model without a tokenizer is not an error, and the result is None.
    """
    if getattr(arguments, "stream", False):
        check_streamable(arguments.model)
    try:
        return load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    except ValueError as error:
        if needed:
            raise
        say(f"going on without a tokenizer, since no text is read ({error})")
        return None


def next_steps(model: torch.nn.Module, out: Path, packed: bool) -> str:
    """Return lines of Python that load the model in `out`, and run it if it is a causal language model."""
    folder, loader = str(out), loader_of(model)
    first = "import sparsekern\n  " if packed else ""
    if loader != CAUSAL:
        return f"""
saved to {folder}; to use it:

  {first}from transformers import {loader}
  model = {loader}.from_pretrained({folder!r})
"""
    return f"""
saved to {folder}; to use it:

  {first}from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained({folder!r})
  tokenizer = AutoTokenizer.from_pretrained({folder!r})
  prompt = tokenizer("The capital of France is", return_tensors="pt")
  output = model.generate(**prompt, max_new_tokens=20)
  print(tokenizer.decode(output[0]))
"""


def check_push_option(arguments: argparse.Namespace) -> None:
    """Raise unless the hub would take a push of `--push-to-hub`, if it is given."""
    if arguments.push_to_hub is not None:
        check_push(arguments.push_to_hub, PUSH)


def push_result(arguments: argparse.Namespace) -> None:
    """Push the finished folder if `--push-to-hub` is given, and print where it is."""
    if arguments.push_to_hub is not None:
        say(f"pushing {arguments.out} to {arguments.push_to_hub}")
        print(f"pushed: {push(arguments.out, arguments.push_to_hub, argument=PUSH)}")


def say(what: str) -> None:
    """Print the current step to standard error."""
    print(f"{what} …", file=sys.stderr, flush=True)


@contextmanager
def _bars_of_tensors_hidden() -> Iterator[None]:
    """Hide transformers' progress bars of tensors: that of GGUF files inside the block, the others from now on."""
    from functools import partial

    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    logging.disable_progress_bar()
    bar = gguf.tqdm
    gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
