"""Sentences as an encoder takes them: each with its special tokens, padded, in batches of similar length."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..models.limits import check_count
from .sources import read_documents

SENTENCES = 1024
FEWEST_WORDS = 4
TOKENS_PER_BATCH = 2048  # padding included
_END = re.compile(r"""(?<=[.!?:])["')\]]?\s+(?=["'(\[]?[A-Z])""")


def split_sentences(documents: Sequence[str]) -> list[str]:
    """Return the sentences of prose, each once, in their order.

    Sentences of fewer than four words in letters, such as headings and code, are left out.
    """
    found: dict[str, None] = {}
    for document in documents:
        for paragraph in document.split("\n\n"):
            for sentence in _END.split(" ".join(paragraph.split())):
                if sum(word.strip(".,;:!?()\"'").isalpha() for word in sentence.split()) >= FEWEST_WORDS:
                    found.setdefault(sentence)
    return list(found)


def sentence_batches(
    source: str | os.PathLike,
    tokenizer: Any,
    *,
    samples: int = SENTENCES,
    length: int = 128,
    seed: int = 0,
    part: str = "calibration",
) -> list[dict[str, torch.Tensor]]:
    """Draw sentences from `source`, none twice.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer, whose special tokens each sentence gets.
        samples: how many sentences, or all where there are fewer.
        length: tokens beyond which a sentence is cut off, special tokens included.
        seed: of the choice.
        part: as for `read_documents`.

    Returns:
        Batches of what the tokenizer makes (`input_ids`, `attention_mask`, …), of at most 2048 tokens unless one sentence has more;
        short sentences first, padded on the right.

    Raises:
        TypeError: `samples` or `length` is not a whole number.
        ValueError: `samples` or `length` below 1, or a length that the special tokens alone take; a source without sentences; a tokenizer
            without a padding token; and what `read_documents` raises.
    """
    check_count("samples", samples)
    check_count("length", length)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError("tokenizer: expected one with a padding token, which batches of sentences need; got one without")
    special = len(tokenizer("")["input_ids"])
    if length <= special:
        raise ValueError(f"length: expected more than the {special} special tokens of each sentence, got {length}")
    sentences = split_sentences(read_documents(source, part))
    if not sentences:
        raise ValueError(f"calibration: {source} holds no sentence of at least {FEWEST_WORDS} words")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return batched([sentences[index] for index in order], tokenizer, length)


def batched(sentences: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, torch.Tensor]]:
    """Return the sentences as batches, sorted by their number of tokens, and in their own order where that is equal."""
    encoded = [tokenizer(sentence, truncation=True, max_length=length) for sentence in sentences]
    encoded.sort(key=lambda sentence: len(sentence["input_ids"]))
    batches, first = [], 0
    while first < len(encoded):
        last = first + 1
        while last < len(encoded) and (last + 1 - first) * len(encoded[last]["input_ids"]) <= TOKENS_PER_BATCH:
            last += 1
        padded = tokenizer.pad(encoded[first:last], padding_side="right", return_tensors="pt")
        batches.append(dict(padded))
        first = last
    return batches
