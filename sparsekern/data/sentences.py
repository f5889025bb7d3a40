"""Batches of sentences for an encoder, each with its special tokens, padded to a similar length."""

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
    """Return the distinct sentences of prose in order.

    Sentences with fewer than four words of letters, such as headings and code, are skipped.
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
    """Draw distinct sentences from `source`.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer. Each sentence gets its special tokens.
        samples: number of sentences; all of them if there are fewer.
        length: the most tokens of a sentence, special tokens included; longer ones are truncated.
        seed: seed of the choice.
        part: part of a built-in text, as `read_documents` takes it.

    Returns:
        Batches of the tokenizer's output (`input_ids`, `attention_mask`, …), padded on the right, short sentences first. A batch has
        at most 2048 tokens unless a single sentence has more.

    Raises:
        TypeError: `samples` or `length` is not a whole number.
        ValueError: `samples` or `length` is below 1, the special tokens alone fill `length`, the source has no sentences, the
            tokenizer has no padding token, or `read_documents` refuses the source.
    """
    check_count("samples", samples)
    check_count("length", length)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError("tokenizer: expected one with a padding token, which batches of sentences need, got one without")
    special = len(tokenizer("")["input_ids"])
    if length <= special:
        raise ValueError(f"length: expected more than the {special} special tokens of each sentence, got {length}")
    sentences = split_sentences(read_documents(source, part))
    if not sentences:
        raise ValueError(f"calibration: {source} holds no sentence of at least {FEWEST_WORDS} words")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return batched([sentences[index] for index in order], tokenizer, length)


def batched(sentences: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, torch.Tensor]]:
    """Return the sentences as batches, sorted stably by their number of tokens."""
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
