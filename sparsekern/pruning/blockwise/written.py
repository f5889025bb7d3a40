"""New weights that a block has for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...models import Linear


def write(linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> None:
    """Give `linears` new weights, by name."""
    for linear in linears:
        linear.weight.copy_(weights[linear.name])


@contextmanager
def restored(linears: Sequence[Linear]) -> Iterator[None]:
    """Restore the weights of `linears` afterwards, so that a failure leaves the block unchanged."""
    before = {linear.name: linear.weight.clone() for linear in linears}
    try:
        yield
    finally:
        write(linears, before)


@contextmanager
def written_meanwhile(linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give `linears` new weights within, and restore their own afterwards."""
    with restored(linears):
        write(linears, weights)
        yield
