"""Batches: several problems of one size in one call, one at each index of a leading dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch


def one_by_one(run: Callable[[int], tuple[torch.Tensor, ...]], count: int) -> tuple[torch.Tensor, ...]:
    """Return the results of `run(index)` for each of at least one problem, each result as a batch.

    Raises:
        ValueError: that of the first problem that raises one, with its index after the argument's name: `gram[3]: expected ...`.
    """
    found = []
    for index in range(count):
        try:
            found.append(run(index))
        except ValueError as error:
            name, colon, rest = str(error).partition(":")
            raise ValueError(f"{name}[{index}]{colon}{rest}") from error
    return tuple(torch.stack(results) for results in zip(*found, strict=True))
