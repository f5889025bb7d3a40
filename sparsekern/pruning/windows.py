"""Calibration samples that are held out: what is fitted on the others is judged on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from .batches import Batch
from .seeds import derived_seed

ONE_OF = 8  # samples, of which one is held out
RUN = 32  # tokens that only windows which overlap have in common
FACTOR = 6364136223846793005  # of a hash of runs, in wrapping arithmetic


def with_held_out(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Return the samples of `batches` in batches that are either held out or not.

    Which samples are held out depends on their number and `seed`, not on how they are divided into batches.

    Args:
        batches: all calibration data, in order.
        seed: draws the samples.

    Raises:
        ValueError: there is a single sample, or a batch that its first dimension does not divide into samples; or the samples that are
            held out, or the others, are all padding.
    """
    samples = sum(batch.shape[0] for batch in batches)
    if samples < 2:
        raise ValueError(f"calibration: expected at least 2 samples, of which one is held out to judge on, got {samples}")
    generator = torch.Generator(device="cpu").manual_seed(derived_seed(seed, "held out"))
    drawn = torch.randperm(samples, generator=generator, device="cpu")[: max(1, samples // ONE_OF)]
    held_out = torch.zeros(samples, dtype=torch.bool, device="cpu")
    held_out[drawn] = True
    found: list[Batch] = []
    for own, batch in zip(held_out.split([batch.shape[0] for batch in batches]), batches, strict=True):
        if own.all() or not own.any():
            found.append(replace(batch, held_out=bool(own.all())))
            continue
        found += [batch.part((~own).nonzero().flatten()), replace(batch.part(own.nonzero().flatten()), held_out=True)]
    for chosen, kind in ((True, f"the {len(drawn)} samples that are held out"), (False, "those that are not held out")):
        if not any(batch.tokens for batch in found if batch.held_out == chosen):
            raise ValueError(f"calibration: expected tokens that are no padding, got none in {kind}")
    return found


def overlapping(batches: Sequence[Batch], chosen: Collection[int]) -> set[int]:
    """Return the numbers of other batches that share a run of `RUN` tokens with the `chosen` ones.

    Windows do so if they overlap, because their text is short, or if the text repeats itself. Padding is no part of a run.
    """
    own = torch.cat([_runs(batches[number]) for number in chosen])
    others = (number for number in range(len(batches)) if number not in chosen)
    return {number for number in others if torch.isin(_runs(batches[number]), own).any()}


def _runs(batch: Batch) -> torch.Tensor:
    """Return hashes of all runs of `RUN` real tokens, `[runs]` int64."""
    ids, mask = batch.inputs[batch.main], batch.mask()
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] < RUN:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    runs = ids.cpu().long().unfold(1, RUN, 1)
    found = torch.zeros(runs.shape[:2], dtype=torch.int64, device="cpu")
    for place in range(RUN):
        found = (found + runs[..., place]) * FACTOR
    return found.flatten() if mask is None else found[mask.cpu().unfold(1, RUN, 1).all(-1)]
