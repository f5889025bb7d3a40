"""How long a model's input may be, which token ids it knows, and how much memory a call may take."""

from __future__ import annotations

import re
from numbers import Integral

import torch
from torch import nn

DEFAULT_LENGTH = 2048
UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a sample may have at most, or None for a model that sets no limit.

    Models such as RoBERTa number their positions from behind the padding index, so the first rows of the table are never used.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def predicts_next_tokens(model: nn.Module) -> bool:
    """Return whether a model is a causal language model, as far as its class says. One that is not of transformers counts as one."""
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not both and bool(getattr(model, "can_generate", lambda: True)())


def window_length(model: nn.Module, length: int | None = None) -> int:
    """Return `length`, or where it is None 2048 tokens, or the model's positions where they are fewer.

    Raises:
        TypeError: `length` is not a whole number.
        ValueError: it is below 1, or above the positions of the model.
    """
    limit = positions(model)
    if length is None:
        return DEFAULT_LENGTH if limit is None else min(DEFAULT_LENGTH, limit)
    check_count("length", length)
    check_length("length", length, limit)
    return length


def check_count(argument: str, value: object) -> None:
    """Raise unless `value` is a whole number of at least 1.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected a whole number of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")


def check_length(argument: str, length: int, limit: int | None) -> None:
    """Raise `ValueError` if `length` is above `limit`, the positions of a model."""
    if limit is not None and length > limit:
        raise ValueError(f"{argument}: expected at most {limit}, the positions of this model, got {length}")


def vocabulary(model: nn.Module) -> int | None:
    """Return how many token ids a model knows, or None where its input embeddings do not tell."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = None if find is None else find()
    except NotImplementedError:  # of transformers, for a model that reads no text, or more than text
        return None
    return getattr(embeddings, "num_embeddings", None)


def check_token_ids(argument: str, ids: torch.Tensor, known: int | None) -> None:
    """Raise `ValueError` if a token id is negative, or not among the `known` ids of a model."""
    low, high = map(int, ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or (known is not None and high >= known):
        expected = "of at least 0" if known is None else f"from 0 to {known - 1}"
        raise ValueError(
            f"{argument}: expected token ids {expected}, got {low if low < 0 else high}; is this the model's own tokenizer?"
        )


def memory_limit(max_memory: int | str | None) -> int | None:
    """Return a limit of memory in bytes; None is none.

    Args:
        max_memory: bytes, or a text such as `"8GB"` (10^9 bytes each) or `"8GiB"` (2^30 bytes each).

    Raises:
        TypeError: it is neither.
        ValueError: a text that is not understood, or less than one byte.
    """
    if max_memory is None:
        return None
    if isinstance(max_memory, bool) or not isinstance(max_memory, (Integral, str)):
        raise TypeError(f"max_memory: expected bytes or a text such as '8GB', got {max_memory!r}")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", str(max_memory).upper())
    unit = UNITS.get((found[2] or "") if found else "?")
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ValueError(f"max_memory: expected bytes or a text such as '8GB', got {max_memory!r}")
    return int(float(found[1]) * unit)
