"""Tuning of one block: its kept weights, norms and biases, so that it returns what the dense model returns there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...methods import BlockTuning
from ...models import Linear
from ...training.grid import grids_of
from ...training.masked_adamw import MaskedAdamW, Trained, kept_weights
from .masters import float32_masters, only_these_require_gradients

SMALLEST = 1e-12  # squared length of a dense hidden state, which divides


@dataclass(frozen=True)
class Samples:
    """The hidden states around a block, batch by batch.

    Attributes:
        run: returns the block's output for a batch, from the pruned model's hidden states.
        target: returns the dense model's output for a batch.
        tokens: returns the mask of the real tokens of a batch, or None where there is no padding.
        fitted: the batches to tune on.
        held_out: the batches to judge on.
    """

    run: Callable[[int], torch.Tensor]
    target: Callable[[int], torch.Tensor]
    tokens: Callable[[int], torch.Tensor | None]
    fitted: Sequence[int]
    held_out: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """What tuning did to a block.

    Attributes:
        before: the held-out error of the method's weights.
        after: the held-out error of the weights that the block has now.
        steps: the optimizer steps that were taken.
        failure: why tuning was given up; empty if it was not.
    """

    before: float
    after: float
    steps: int
    failure: str = ""


def trained_of(block: nn.Module, linears: Sequence[Linear], name: str, *, on_grid: bool = False) -> list[Trained]:
    """Return what tuning changes of a block: the parameters of `linears`, on their kept weights, and all vectors.

    Args:
        block: the block.
        linears: its pruned linears.
        name: its name in the model.
        on_grid: whether the linears keep values of 4 bits.
    """
    masks, grids = kept_weights(linears), grids_of(linears if on_grid else ())
    return [
        Trained(f"{name}.{own_name}", parameter, masks.get(parameter), grids.get(parameter))
        for own_name, parameter in block.named_parameters()
        if parameter in masks or parameter.dim() < 2
    ]


def tune_block(block: nn.Module, trained: Sequence[Trained], samples: Samples, settings: BlockTuning, seed: int) -> Outcome:
    """Tune a block in place.

    Args:
        block: the block, with the weights of the method.
        trained: what to change of it.
        samples: hidden states in front of the block, and the targets behind it.
        settings: see `BlockTuning`.
        seed: seed of the order of the batches.

    Returns:
        The errors before and after. A block that tuning does not improve, or whose loss is not finite, keeps the method's weights.
    """
    parameters = [of.parameter for of in trained]
    first = [parameter.detach().clone() for parameter in parameters]
    before = _error(samples, samples.held_out)
    kept, after, failure, taken = first, before, "", 0
    with float32_masters(parameters) as autocast, only_these_require_gradients(block, parameters):
        optimizer = MaskedAdamW(trained, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)
        steps = _steps(samples, settings, seed)
        total, waited = sum(map(len, steps)), 0
        for of_pass in steps:
            for batches in of_pass:
                lr = settings.learning_rate * (1 - taken / total)
                loss = _step(samples, batches, optimizer, lr, settings.clip, autocast)
                if not loss < float("inf"):
                    failure = f"the loss of step {taken + 1} is {loss}"
                    break
                taken += 1
            if failure:
                break
            with autocast:
                error = _error(samples, samples.held_out)
            if error < after:
                kept, after, waited = [parameter.detach().clone() for parameter in parameters], error, 0
            else:
                waited += 1
                if waited == settings.patience:
                    break
        if failure:
            kept, after = first, before
    _write(parameters, kept)
    if kept is not first and any(parameter.dtype != torch.float32 for parameter in parameters):
        after = _error(samples, samples.held_out)  # of the rounded weights
        if not after < before:
            _write(parameters, first)
            after = before
    return Outcome(before, after, taken, failure)


def _steps(samples: Samples, settings: BlockTuning, seed: int) -> list[list[list[int]]]:
    """Return the batches of each optimizer step of each pass."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sizes = {number: _count(samples, number) for number in samples.fitted}
    passes = []
    for _ in range(settings.passes):
        steps: list[list[int]] = []
        gathered: list[int] = []
        for place in torch.randperm(len(samples.fitted), generator=generator, device="cpu").tolist():
            gathered.append(samples.fitted[place])
            if sum(sizes[number] for number in gathered) >= settings.batch_tokens:
                steps.append(gathered)
                gathered = []
        passes.append([*steps, gathered] if gathered else steps)
    return passes


def _count(samples: Samples, number: int) -> int:
    mask, target = samples.tokens(number), samples.target(number)
    return target.shape[:-1].numel() if mask is None else int(mask.sum())


def _step(
    samples: Samples, batches: Sequence[int], optimizer: MaskedAdamW, lr: float, clip: float, autocast: torch.autocast
) -> float:
    """Take one optimizer step on the mean error of all tokens of some batches, and return that error."""
    tokens = sum(_count(samples, number) for number in batches)
    total = 0.0
    for number in batches:
        with torch.enable_grad():
            with autocast:
                output = samples.run(number)
            loss = _errors(samples, number, output).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if total < float("inf") and optimizer.step(lr, clip) < float("inf"):
        return total
    return total if not total < float("inf") else float("nan")


def _error(samples: Samples, batches: Iterable[int]) -> float:
    """Return the mean error of the tokens of some batches."""
    errors = [_errors(samples, number, samples.run(number)) for number in batches]
    return float(torch.cat(errors).mean(dtype=torch.float64))


def _errors(samples: Samples, number: int, output: torch.Tensor) -> torch.Tensor:
    """Return the error of each real token of a batch."""
    target, mask = samples.target(number), samples.tokens(number)
    width = target.shape[-1]
    output, target = output.float().reshape(-1, width), target.float().reshape(-1, width)
    errors = (output - target).square().sum(1) / target.square().sum(1).clamp_min(SMALLEST)
    return errors if mask is None else errors[mask.reshape(-1)]


def _write(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
