"""Tuning of one block: its kept weights, norms and biases, so that it returns what the dense model returns there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ...methods import BlockTuning
from ...models import Linear
from ...training.grid import grids_of
from ...training.masked_adamw import MaskedAdamW, Trained, kept_weights
from .masters import float32_masters, only_these_require_gradients
from .together import Together, gradients_of

SMALLEST = 1e-12  # squared length of a dense hidden state, which divides


@dataclass(frozen=True)
class Samples:
    """The hidden states around a block, batch by batch.

    Attributes:
        run: returns the block's output for a batch, from the pruned model's hidden states.
        target: returns the dense model's output for a batch.
        real: returns which rows of the hidden states of a batch are of real tokens, or None where all are.
        count: returns the number of rows of a batch that are of real tokens.
        fitted: the batches to tune on, by leaf.
        held_out: the batches to judge on, by leaf.
        together: the processes that tune the block, each with the batches of its own leaves.
    """

    run: Callable[[int], torch.Tensor]
    target: Callable[[int], torch.Tensor]
    real: Callable[[int, torch.Tensor], torch.Tensor | None]
    count: Callable[[int], int]
    fitted: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    together: Together = Together()


@dataclass(frozen=True)
class _Step:
    """One optimizer step.

    Attributes:
        batches: the batches of each leaf of this process.
        tokens: the number of tokens of all processes.
    """

    batches: Sequence[Sequence[int]]
    tokens: int


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
    before = _error(samples)
    kept, after, failure, taken = first, before, "", 0
    masters = float32_masters(parameters, mixed_precision=settings.mixed_precision)
    with masters as (training, judging), only_these_require_gradients(block, parameters):
        optimizer = MaskedAdamW(trained, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)
        steps = _steps(samples, settings, seed)
        total, waited = sum(map(len, steps)), 0
        for of_pass in steps:
            for step in of_pass:
                lr = settings.learning_rate * (1 - taken / total)
                loss = _take(samples, step, optimizer, lr, settings.clip, training)
                if not loss < float("inf"):
                    failure = f"the loss of step {taken + 1} is {loss}"
                    break
                taken += 1
            if failure:
                break
            with judging:
                error = _error(samples)
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
        after = _error(samples)  # of the rounded weights
        if not after < before:
            _write(parameters, first)
            after = before
    return Outcome(before, after, taken, failure)


def _steps(samples: Samples, settings: BlockTuning, seed: int) -> list[list[_Step]]:
    """Return the optimizer steps of each pass. A step takes batches of all leaves in turns, until it has enough tokens.

    Which batches it takes depends on the leaves, not on the number of processes.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    together = samples.together
    sizes = together.of_all_leaves([[samples.count(number) for number in leaf] for leaf in samples.fitted])
    passes: list[list[_Step]] = []
    for _ in range(settings.passes):
        orders = [torch.randperm(len(leaf), generator=generator, device="cpu").tolist() for leaf in sizes]
        turns = max(map(len, orders))
        steps: list[_Step] = []
        gathered: list[list[int]] = [[] for _ in sizes]
        for turn in range(turns):
            for places, order in zip(gathered, orders, strict=True):
                places += order[turn : turn + 1]
            tokens = sum(leaf[place] for leaf, places in zip(sizes, gathered, strict=True) for place in places)
            if tokens >= settings.batch_tokens or (tokens and turn == turns - 1):
                own = zip(samples.fitted, together.own_of(gathered), strict=True)
                steps.append(_Step([[leaf[place] for place in places] for leaf, places in own], tokens))
                gathered = [[] for _ in sizes]
        passes.append(steps)
    return passes


def _take(samples: Samples, step: _Step, optimizer: MaskedAdamW, lr: float, clip: float, autocast: torch.autocast) -> float:
    """Take one optimizer step on the mean error of all tokens of some batches, and return that error."""
    together, parameters = samples.together, [of.parameter for of in optimizer.trained]
    if together.leaves == 1:
        total = _sum(samples, step.batches[0], step.tokens, autocast)
    else:
        own = (partial(_sum, samples, batches, step.tokens, autocast) for batches in step.batches)
        *gradients, loss = together.total(gradients_of(parameters, of_leaf) for of_leaf in own)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        total = float(loss)
    if total < float("inf") and optimizer.step(lr, clip) < float("inf"):
        return total
    return total if not total < float("inf") else float("nan")


def _backward(samples: Samples, number: int, tokens: int, autocast: torch.autocast) -> float:
    """Add the gradient of the errors of a batch, each divided by `tokens`, and return their sum."""
    samples.together.world.check()
    with torch.enable_grad():
        with autocast:
            output = samples.run(number)
        loss = _errors(samples, number, output).sum() / tokens
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _sum(samples: Samples, batches: Iterable[int], tokens: int, autocast: torch.autocast) -> float:
    """Add the gradients of the errors of some batches, each divided by `tokens`, and return their sum."""
    return sum(_backward(samples, number, tokens, autocast) for number in batches)


def _error(samples: Samples) -> float:
    """Return the mean error of all held-out tokens."""
    error, tokens = samples.together.total(_error_of(samples, batches) for batches in samples.held_out)
    return float(error / tokens)


def _error_of(samples: Samples, batches: Iterable[int]) -> list[torch.Tensor]:
    """Return the sum of the errors of some batches, and the number of their tokens, `[]` float64 each."""
    errors: list[torch.Tensor] = []
    for number in batches:
        samples.together.world.check()
        errors.append(_errors(samples, number, samples.run(number)))
    if not errors:
        return [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    every = torch.cat(errors)
    return [every.sum(dtype=torch.float64).cpu(), torch.tensor(len(every), dtype=torch.float64)]


def _errors(samples: Samples, number: int, output: torch.Tensor) -> torch.Tensor:
    """Return the error of each row of a batch that is of a real token."""
    target = samples.target(number)
    mask, width = samples.real(number, target), target.shape[-1]
    output, target = output.float().reshape(-1, width), target.float().reshape(-1, width)
    errors = (output - target).square().sum(1) / target.square().sum(1).clamp_min(SMALLEST)
    return errors if mask is None else errors[mask]


def _write(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
