"""Calibration tokens: text to windows of token ids, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import torch

from .sources import read_documents

SEPARATOR = "\n\n"
CHARACTERS_PER_TOKEN = 16  # of a source beyond this many characters a token asked for, only some documents are read


def calibration_ids(source: str | Path, tokenizer, *, samples: int = 128, length: int = 2048, seed: int = 0) -> torch.Tensor:
    """Draw calibration windows from `source`.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer.
        samples: number of windows.
        length: tokens in a window.
        seed: of a large source's documents, and of the windows.

    Returns:
        `[samples, length]` int64.

    Raises:
        ValueError: fewer tokens in the source than one window needs; and what `read_documents` raises.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    documents = _choose(read_documents(source), samples * length * CHARACTERS_PER_TOKEN, seed)
    tokens = encode(documents, tokenizer)
    if len(tokens) < length:
        raise ValueError(f"calibration: {source} has {len(tokens)} tokens; one window of length {length} needs {length}")
    return sample_windows(tokens, samples, length, seed)


def encode(documents: list[str], tokenizer) -> torch.Tensor:
    """The token ids of the documents joined by blank lines, `[tokens]` int64, with the tokenizer's own special tokens."""
    # verbose=False: no warning that the whole text is longer than the model's context; it is cut into windows.
    encoded = tokenizer(SEPARATOR.join(documents), return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def sample_windows(tokens: torch.Tensor, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Cut `samples` windows out of `tokens`: one at a random place of each of `samples` equal stretches of the text.

    So the whole text is covered evenly, and windows overlap only as much as a short text makes them.

    Args:
        tokens: `[tokens]`, at least `length` of them.

    Returns:
        `[samples, length]`, in the order of the text.
    """
    if len(tokens) < length:
        raise ValueError(f"tokens: expected at least {length} for one window, got {len(tokens)}")
    generator = torch.Generator().manual_seed(seed)
    places = len(tokens) - length + 1
    offsets = (torch.arange(samples) + torch.rand(samples, generator=generator, dtype=torch.float64)) / samples
    starts = (offsets * places).long().clamp_(max=places - 1)
    return tokens[starts[:, None] + torch.arange(length)]


def _choose(documents: list[str], characters: int, seed: int) -> list[str]:
    """Documents at random, in their own order, until they hold `characters`: a large data set is not tokenized as a whole."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, held = [], 0
    for index in order:
        if held >= characters:
            break
        chosen.append(index)
        held += len(documents[index])
    return [documents[index] for index in sorted(chosen)]
