"""Sentences as an encoder gets them: each with its special tokens, padded, in batches of like length."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .sources import read_documents

FEWEST_WORDS = 4
TOKENS_PER_BATCH = 2048  # padding included
_END = re.compile(r"""(?<=[.!?:])["')\]]?\s+(?=["'(\[]?[A-Z])""")


def split_sentences(documents: list[str]) -> list[str]:
    """The sentences of prose, each once, in their order. Those of fewer than four words in letters (headings, code) are left out."""
    found: dict[str, None] = {}
    for document in documents:
        for paragraph in document.split("\n\n"):
            for sentence in _END.split(" ".join(paragraph.split())):
                if sum(word.strip(".,;:!?()\"'").isalpha() for word in sentence.split()) >= FEWEST_WORDS:
                    found.setdefault(sentence)
    return list(found)


def sentence_batches(
    source: str | Path, tokenizer, *, samples: int = 1024, length: int = 128, seed: int = 0, part: str = "calibration"
) -> list[dict[str, torch.Tensor]]:
    """Draw sentences from `source`, none twice.

    Args:
        source: anything that `read_documents` takes.
        tokenizer: a transformers tokenizer, whose special tokens each sentence gets.
        samples: how many sentences, or all where there are fewer.
        length: tokens beyond which a sentence is cut off.
        seed: of the choice.
        part: as `read_documents` has it.

    Returns:
        Batches of what the tokenizer makes (`input_ids`, `attention_mask`, …), of at most 2048 tokens where a sentence is not longer;
        short sentences first, padded on the right.

    Raises:
        ValueError: `samples` or `length` below 1, a source without sentences; and what `read_documents` raises.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    sentences = split_sentences(read_documents(source, part))
    if not sentences:
        raise ValueError(f"calibration: {source} holds no sentence of at least {FEWEST_WORDS} words")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return batched([sentences[index] for index in order], tokenizer, length)


def batched(sentences: list[str], tokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """The sentences as batches, sorted by their number of tokens (in their order where that is equal)."""
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
