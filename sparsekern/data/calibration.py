"""Calibration and evaluation tokens: windows of token ids cut from a text, equal for equal seeds.

A window is cut from the middle of running text. Some tokenizers put special tokens in front of a text, such as the BOS of Llama and
Gemma. Each window then begins with them, as every training text did. Special tokens behind a text (EOS, SEP) mark its end, so windows
have none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.limits import check_count, window_length
from .own_samples import continued, own_windows
from .sentences import SENTENCES, sentence_batches
from .sources import check_source, is_own, read_documents

if TYPE_CHECKING:
    from typing_extensions import TypeIs

SEPARATOR = "\n\n"
CHARACTERS_PER_TOKEN = 16  # documents with this many characters for each wanted token are read, the others are not
PROBE = 64  # characters of text that are tokenized to find the special tokens in front of it
WINDOWS = 128
GIVEN_PART = 8  # a window that goes on with a text has one of so many tokens from it
Source = str | os.PathLike


def is_source(calibration: object) -> TypeIs[str | os.PathLike]:
    """Return whether `calibration` names a text instead of holding token ids."""
    return isinstance(calibration, (str, os.PathLike))


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on, read after the model was loaded and checked.

    Attributes:
        source: anything that `read_documents` takes, or the tokens that the model writes itself, such as `"self:200k"`.
        tokenizer: the model's transformers tokenizer; None where the model writes the text.
        samples: number of windows or sentences. None is 128 windows or 1024 sentences.
        length: tokens in a window, or the most tokens of a sentence. None is 2048, or the model's positions if they are fewer.
        seed: seed of the choice of windows or sentences.
        sentences: read sentences for an encoder instead of windows of running text.
        progress: show a progress bar while the model writes.
    """

    source: Source
    tokenizer: Any
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    sentences: bool = False
    progress: bool = field(default=False, compare=False)
    _found: dict[int, torch.Tensor | list[dict[str, torch.Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # by length

    def __post_init__(self) -> None:
        if self.tokenizer is None and not is_own(self.source):
            raise ValueError(f"tokenizer: expected the model's tokenizer to read calibration={str(self.source)!r} with, got None")
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer)
        for name, value in (("samples", self.samples), ("length", self.length)):
            if value is not None:
                check_count(name, value)
        check_source(self.source)  # also where nothing reads it

    def read(self, model: nn.Module) -> torch.Tensor | list[dict[str, torch.Tensor]]:
        """Read the samples, none longer than the positions of `model`. A text is read once, however often it is asked for.

        Returns:
            `[samples, length]` int64, or a list of batches of sentences.

        Raises:
            ValueError: `length` exceeds the model's positions, or the text is too short.
            OSError: the text cannot be read; see `read_documents`.
        """
        length = window_length(model, self.length)
        if is_own(self.source):
            if self.sentences:
                raise ValueError(f"calibration: expected a text for {type(model).__name__}, which writes none, got {self.source!r}")
            return own_windows(model, str(self.source), samples=self.samples, length=length, seed=self.seed, progress=self.progress)
        if length not in self._found:
            self._found[length] = self._read(length)
        return self._found[length]

    def continued(self, model: nn.Module, samples: int) -> torch.Tensor:
        """Return windows of which the first part is of the text, and the rest what `model`, still dense, writes behind it.

        Args:
            model: the model.
            samples: number of windows.

        Returns:
            `[samples, length]` int64.

        Raises:
            ValueError: as by `read`; also the model predicts no next tokens, or a window is too short for a part of it.
        """
        length = window_length(model, self.length)
        given = length // GIVEN_PART
        if not given:
            raise ValueError(f"length: expected at least {GIVEN_PART} tokens for windows that go on with a text, got {length}")
        passages = replace(self, samples=samples, length=given).read(model)
        assert isinstance(passages, torch.Tensor)
        return continued(model, passages, length=length, seed=self.seed, progress=self.progress)

    def _read(self, length: int) -> torch.Tensor | list[dict[str, torch.Tensor]]:
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
    progress: bool = False,
) -> Any:
    """Return a `CalibrationText` for the name of a text, and other calibration data unchanged.

    Args:
        calibration: a text, as `read_documents` takes it, or calibration data.
        tokenizer: the model's tokenizer, which a text needs.
        samples: as in `CalibrationText`; only for a text.
        length: as in `CalibrationText`; only for a text.
        seed: as in `CalibrationText`.
        sentences: as in `CalibrationText`.
        progress: as in `CalibrationText`.

    Raises:
        TypeError: `tokenizer` is not a tokenizer, or `samples` or `length` is not a whole number.
        ValueError: a text comes without `tokenizer`, or `samples` or `length` is below 1 or given without a text.
    """
    if is_source(calibration):
        return CalibrationText(calibration, tokenizer, samples, length, seed, sentences, progress)
    for name, value in (("samples", samples), ("length", length)):
        if value is not None:
            raise ValueError(f"{name}: expected None unless calibration is a text, got {value!r}")
    return calibration


def describe_calibration(calibration: torch.Tensor | Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Return the amount of calibration data in words, such as `"128 x 2048 tokens"`."""
    if isinstance(calibration, torch.Tensor):
        return f"{len(calibration)} x {calibration.shape[1]} tokens"
    return f"{sum(len(batch['input_ids']) for batch in calibration)} sentences"


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `TypeError` unless `tokenizer` can be called on a text."""
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")


def calibration_ids(source: Source, tokenizer: Any, *, samples: int = WINDOWS, length: int = 2048, seed: int = 0) -> torch.Tensor:
    """Draw calibration windows from `source`.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer. Each window begins with the special tokens that it puts in front of a text, such as BOS.
        samples: number of windows.
        length: tokens in a window, special tokens included.
        seed: seed of the choice of documents in a large source, and of the windows.

    Returns:
        `[samples, length]` int64.

    Raises:
        TypeError: `samples` or `length` is not a whole number.
        ValueError: the source has fewer tokens than one window needs, or `read_documents` refuses it.
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
    """Cut `source` into consecutive windows for `perplexity`.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer. Each window begins with the special tokens that it puts in front of a text, such as BOS.
        length: tokens in a window, special tokens included.
        windows: number of windows from the beginning. None takes all; a remainder shorter than a window is dropped.
        part: part of a built-in text, as `read_documents` takes it.

    Returns:
        `[windows, length]` int64.

    Raises:
        TypeError: `length` or `windows` is not a whole number.
        ValueError: the source has fewer tokens than one window needs, or `read_documents` refuses it.
    """
    check_count("length", length)
    if windows is not None:
        check_count("windows", windows)
    documents = read_documents(source, part)
    prefix, tokens = special_prefix(documents, tokenizer), encode(documents, tokenizer)
    inner = _inner_length(source, "text", prefix, tokens, length)
    return _begun_by(prefix, tokens[: len(tokens) // inner * inner].view(-1, inner)[:windows])


def encode(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Return the token ids `[tokens]` int64 of the documents joined by blank lines, without special tokens."""
    return torch.tensor(_ids(SEPARATOR.join(documents), tokenizer, add_special_tokens=False), dtype=torch.int64)


def special_prefix(documents: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Return the special tokens that the tokenizer puts in front of a text, `[tokens]` int64, often none."""
    text = documents[0][:PROBE]
    whole, inner = _ids(text, tokenizer, add_special_tokens=True), _ids(text, tokenizer, add_special_tokens=False)
    starts = range(len(whole) - len(inner), -1, -1)
    start = next((start for start in starts if whole[start : start + len(inner)] == inner), 0)
    return torch.tensor(whole[:start], dtype=torch.int64)


def _ids(text: str, tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
    # verbose=False hides the warning that the text exceeds the model's context: it is cut into windows.
    return tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)["input_ids"]


def _inner_length(source: object, argument: str, prefix: torch.Tensor, tokens: torch.Tensor, length: int) -> int:
    """Return the number of text tokens in a window; raise `ValueError` if the text has fewer."""
    inner = length - len(prefix)
    if inner < 1:
        raise ValueError(f"length: expected more than the {len(prefix)} special tokens that begin each window, got {length}")
    if len(tokens) < inner:
        beside = f" and {len(prefix)} special" if len(prefix) else ""
        raise ValueError(f"{argument}: {source} has {len(tokens)} tokens; one window of length {length} needs {inner}{beside}")
    return inner


def _begun_by(prefix: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Put the special tokens in front of each window."""
    return torch.cat([prefix.expand(len(windows), -1), windows], dim=1)


def sample_windows(tokens: torch.Tensor, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Cut windows out of `tokens`, one at a random place in each of `samples` equal stretches.

    The windows cover the whole text evenly. They overlap only if the text is short.

    Args:
        tokens: `[tokens]`, at least `length` of them.
        samples: number of windows.
        length: tokens in a window.
        seed: seed of the random places.

    Returns:
        `[samples, length]`, in the order of the text.

    Raises:
        ValueError: there are fewer than `length` tokens.
    """
    if len(tokens) < length:
        raise ValueError(f"tokens: expected at least {length} for one window, got {len(tokens)}")
    generator = torch.Generator().manual_seed(seed)
    places = len(tokens) - length + 1
    offsets = (torch.arange(samples) + torch.rand(samples, generator=generator, dtype=torch.float64)) / samples
    starts = (offsets * places).long().clamp_(max=places - 1)
    return tokens[starts[:, None] + torch.arange(length)]


def _choose(documents: list[str], characters: int, seed: int) -> list[str]:
    """Choose random documents that hold `characters` together, so that a large dataset is not tokenized whole.

    Returns:
        The chosen documents in their original order.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, held = [], 0
    for index in order:
        if held >= characters:
            break
        chosen.append(index)
        held += len(documents[index])
    return [documents[index] for index in sorted(chosen)]
