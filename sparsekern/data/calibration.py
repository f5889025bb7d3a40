"""Calibration and evaluation tokens: text to windows of token ids, the same for the same seed.

A window is cut from the middle of running text. Where the tokenizer puts special tokens in front of a text, as the BOS of Llama and
Gemma, each window begins with them, as every text does that the model was trained on. Special tokens behind a text (EOS, SEP) say that
the text ends; a window does not have them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.limits import check_count, window_length
from .sentences import SENTENCES, sentence_batches
from .sources import read_documents

SEPARATOR = "\n\n"
CHARACTERS_PER_TOKEN = 16  # of a source with more characters a token than this, only some documents are read
PROBE = 64  # characters, by which the special tokens in front of a text are found
WINDOWS = 128
Source = str | os.PathLike


def is_source(calibration: object) -> bool:
    """Return whether `calibration` names a text, rather than holding token ids."""
    return isinstance(calibration, (str, os.PathLike))


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on, which is read once the model is known and checked.

    Attributes:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer, that of the model.
        samples: number of windows or sentences; None is 128 windows or 1024 sentences.
        length: tokens in a window, or beyond which a sentence is cut off; None is 2048, or the model's positions where they are fewer.
        seed: of the choice of windows or sentences.
        sentences: read sentences, as an encoder takes them, instead of windows of running text.
    """

    source: Source
    tokenizer: Any
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    sentences: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise ValueError(
                f"tokenizer: expected the model's tokenizer, which calibration={str(self.source)!r} is read with; got None"
            )
        check_tokenizer(self.tokenizer)
        for name, value in (("samples", self.samples), ("length", self.length)):
            if value is not None:
                check_count(name, value)

    def read(self, model: nn.Module) -> torch.Tensor | list[dict[str, torch.Tensor]]:
        """Read the samples, none of them longer than `model` has positions.

        Returns:
            `[samples, length]` int64, or for sentences a list of batches.

        Raises:
            ValueError: `length` is above the model's positions; too little text; and what `read_documents` raises.
        """
        length = window_length(model, self.length)
        if self.sentences:
            samples = SENTENCES if self.samples is None else self.samples
            return sentence_batches(self.source, self.tokenizer, samples=samples, length=length, seed=self.seed)
        samples = WINDOWS if self.samples is None else self.samples
        return calibration_ids(self.source, self.tokenizer, samples=samples, length=length, seed=self.seed)


def as_calibration(
    calibration: Any,
    *,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sentences: bool = False,
) -> Any:
    """Return a `CalibrationText` for the name of a text, and other calibration data unchanged. The other arguments are the text's.

    Raises:
        TypeError: something else than a tokenizer; `samples` or `length` is not a whole number.
        ValueError: a text without `tokenizer`; `samples` or `length` below 1, or given without a text.
    """
    if is_source(calibration):
        return CalibrationText(calibration, tokenizer, samples, length, seed, sentences)
    for name, value in (("samples", samples), ("length", length)):
        if value is not None:
            raise ValueError(f"{name}: expected None, calibration is no text to be cut into samples; got {value!r}")
    return calibration


def describe_calibration(calibration: torch.Tensor | Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Return in words how much a `CalibrationText` read."""
    if isinstance(calibration, torch.Tensor):
        return f"{len(calibration)} x {calibration.shape[1]} tokens"
    return f"{sum(len(batch['input_ids']) for batch in calibration)} sentences"


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `TypeError` for what cannot be called on a text."""
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")


def calibration_ids(source: Source, tokenizer: Any, *, samples: int = WINDOWS, length: int = 2048, seed: int = 0) -> torch.Tensor:
    """Draw calibration windows from `source`.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer. Each window begins with the special tokens that it puts in front of a text, such as BOS.
        samples: number of windows.
        length: tokens in a window.
        seed: of a large source's documents, and of the windows.

    Returns:
        `[samples, length]` int64.

    Raises:
        TypeError: `samples` or `length` is not a whole number.
        ValueError: fewer tokens in the source than one window needs; and what `read_documents` raises.
    """
    check_count("samples", samples)
    check_count("length", length)
    documents = _choose(read_documents(source), samples * length * CHARACTERS_PER_TOKEN, seed)
    prefix, tokens = special_prefix(documents, tokenizer), encode(documents, tokenizer)
    inner = _inner_length(source, "calibration", prefix, tokens, length)
    return _begun_by(prefix, sample_windows(tokens, samples, inner, seed))


def evaluation_ids(
    source: Source, tokenizer: Any, length: int, *, windows: int | None = None, part: str = "held-out"
) -> torch.Tensor:
    """Cut `source` into consecutive windows to take the perplexity on.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer. Each window begins with the special tokens that it puts in front of a text, such as BOS.
        length: tokens in a window, with these.
        windows: take only so many from the beginning; None takes all. A remainder shorter than a window is left out.
        part: as for `read_documents`.

    Returns:
        `[windows, length]` int64, for `perplexity`.

    Raises:
        TypeError: `length` or `windows` is not a whole number.
        ValueError: fewer tokens in the source than one window needs; and what `read_documents` raises.
    """
    check_count("length", length)
    if windows is not None:
        check_count("windows", windows)
    documents = read_documents(source, part)
    prefix, tokens = special_prefix(documents, tokenizer), encode(documents, tokenizer)
    inner = _inner_length(source, "text", prefix, tokens, length)
    return _begun_by(prefix, tokens[: len(tokens) // inner * inner].view(-1, inner)[:windows])


def encode(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Return the token ids of the documents joined by blank lines, `[tokens]` int64, without special tokens around them."""
    return torch.tensor(_ids(SEPARATOR.join(documents), tokenizer, add_special_tokens=False), dtype=torch.int64)


def special_prefix(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Return the special tokens that the tokenizer puts in front of the documents, `[tokens]` int64; none for many tokenizers."""
    text = documents[0][:PROBE]
    whole, inner = _ids(text, tokenizer, add_special_tokens=True), _ids(text, tokenizer, add_special_tokens=False)
    starts = range(len(whole) - len(inner), -1, -1)
    start = next((start for start in starts if whole[start : start + len(inner)] == inner), 0)
    return torch.tensor(whole[:start], dtype=torch.int64)


def _ids(text: str, tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
    # verbose=False: no warning that the whole text is longer than the model's context; it is cut into windows.
    return tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)["input_ids"]


def _inner_length(source: object, argument: str, prefix: torch.Tensor, tokens: torch.Tensor, length: int) -> int:
    """Return how many tokens of the text a window takes, if there are so many."""
    inner = length - len(prefix)
    if inner < 1:
        raise ValueError(f"length: expected more than the {len(prefix)} special tokens that begin each window, got {length}")
    if len(tokens) < inner:
        beside = f" and {len(prefix)} special" if len(prefix) else ""
        raise ValueError(f"{argument}: {source} has {len(tokens)} tokens; one window of length {length} needs {inner}{beside}")
    return inner


def _begun_by(prefix: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    return torch.cat([prefix.expand(len(windows), -1), windows], dim=1)


def sample_windows(tokens: torch.Tensor, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Cut `samples` windows out of `tokens`, one at a random place in each of `samples` equal stretches of the text.

    The whole text is covered evenly, and windows overlap only as much as a short text makes them.

    Args:
        tokens: `[tokens]`, at least `length` of them.
        samples: number of windows.
        length: tokens in a window.
        seed: of the places.

    Returns:
        `[samples, length]`, in the order of the text.

    Raises:
        ValueError: fewer than `length` tokens.
    """
    if len(tokens) < length:
        raise ValueError(f"tokens: expected at least {length} for one window, got {len(tokens)}")
    generator = torch.Generator().manual_seed(seed)
    places = len(tokens) - length + 1
    offsets = (torch.arange(samples) + torch.rand(samples, generator=generator, dtype=torch.float64)) / samples
    starts = (offsets * places).long().clamp_(max=places - 1)
    return tokens[starts[:, None] + torch.arange(length)]


def _choose(documents: list[str], characters: int, seed: int) -> list[str]:
    """Choose documents at random until they hold `characters`, so that a large data set is not tokenized as a whole.

    Returns:
        The chosen documents, in their own order.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, held = [], 0
    for index in order:
        if held >= characters:
            break
        chosen.append(index)
        held += len(documents[index])
    return [documents[index] for index in sorted(chosen)]
