"""How much the loss minds an error at each output: the mean square of its gradient there.

The loss is that of labels which the model itself draws, so its square is the curvature of the KL divergence from the dense model. It
takes one forward and one backward pass over a few thousand tokens.

The outputs of fused experts are inside one module. They are computed again from what it was called with, and the gradient behind it is
taken back to them.

A streamed model is read twice, forward and backward. The inputs of all blocks are kept between, and each block runs again with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..models import Linear
from ..models.experts import DOWN, GATE, UP, Experts, ExpertsCall
from ..models.streaming import in_memory
from ..ranks import World
from ..ranks.sums import total_of_leaves
from .batches import Batch
from .blockwise.chain import Chain
from .blockwise.course import Course
from .blockwise.experts import experts_in, is_expert, parted
from .blockwise.shares import Share
from .blockwise.shelf import Shelf
from .seeds import derived_seed

TOKENS = 4096  # that the loss is taken of
LENGTH = 512  # of them in one forward and backward pass, whose logits are all in memory
LOGIT = 20  # bytes of each logit in such a pass: it, its gradient, both in float32, and their softmax
Squares = dict[str, torch.Tensor]  # by linear, sums of squares of the gradient at its outputs, behind them the number of its rows
ExpertsRun = tuple[Experts, ExpertsCall, torch.Tensor]  # a call, and the gradient at what it returned, `[rows, hidden]`


def gradient_squares(
    model: nn.Module,
    linears: Sequence[Linear],
    batches: Sequence[Batch],
    seed: int,
    *,
    listed: Collection[str] = (),
    world: World | None = None,
    leaves: int = 1,
    streamed: tuple[Course, Shelf] | None = None,
) -> dict[str, torch.Tensor]:
    """Return for each linear the mean square of the loss's gradient at its outputs, `[out_features]` float64, by name.

    That of an expert's linear is the mean over the tokens that are routed to it and have a gradient there. Where there are none, it is
    left out.

    Several processes each run the samples of their own leaves, and the sums are added in the tree of all leaves. All of them call this.

    Args:
        model: the model, ready to run.
        linears: the linears.
        batches: the calibration data, of which the first tokens are taken.
        seed: draws the labels.
        listed: the names of linears of experts that are modules of their own.
        world: the processes; None is this one.
        leaves: the number of parts of each sum.
        streamed: how forwards of a streamed model run, and what keeps the inputs of its blocks; None of a model in memory.

    Raises:
        ValueError: the model returns no logits of each token.
    """
    world = world or World()
    samples = _samples(batches)
    share = Share(world, samples, leaves)
    if streamed is None:
        found = _of_whole_passes(model, linears, share, seed)
    else:
        found = _of_one_block_after_another(model, linears, share, seed, *streamed)
    tokens = sum(sample.tokens for sample in samples)
    experts = {linear.name for linear in linears if is_expert(linear)}.union(listed)
    return {name: total[:-1] / (rows if name in experts else tokens) for name, total in found.items() if (rows := float(total[-1]))}


def backward_bytes(vocabulary: int) -> int:
    """Return the bytes that the logits of one pass take."""
    return LOGIT * LENGTH * vocabulary


def _of_whole_passes(model: nn.Module, linears: Sequence[Linear], share: Share, seed: int) -> Squares:
    """Return the sums of squares over the samples of all processes, each in a pass through the whole model."""

    device = next(model.parameters()).device

    def of_leaf(leaf: int, samples: Sequence[Batch]) -> Squares:
        sums, labels = _zeros(linears, device), _labels(seed, leaf)
        for sample in samples:
            share.world.check()
            with torch.enable_grad(), _squaring(linears, sums):
                _loss(model, model(**sample.inputs, use_cache=False), sample, labels).backward()  # type: ignore[no-untyped-call]
        return sums

    with _frozen(model.parameters()):
        return _total(share, (of_leaf(leaf, samples) for leaf, samples in _by_leaf(share, share.batches)))


def _of_one_block_after_another(
    model: nn.Module, linears: Sequence[Linear], share: Share, seed: int, course: Course, shelf: Shelf
) -> Squares:
    """Return the same sums as `_of_whole_passes`, with one block at a time in memory."""
    chain, check = Chain(model, share.batches, course, shelf), share.world.check
    numbers, device = range(len(share.batches)), next(model.parameters()).device
    for index in course.order:
        with in_memory(model, index):
            for number in numbers:
                check()
                shelf.put((index, number), chain.hidden(number))
                chain.advance(number, index)
    inside_blocks = {parameter for block in course.blocks.modules for parameter in block.parameters()}
    with _frozen(parameter for parameter in model.parameters() if parameter not in inside_blocks):
        for leaf, own in _by_leaf(share, numbers):
            labels = _labels(seed, leaf)
            for number in own:
                check()
                hidden = chain.hidden(number).detach().requires_grad_()
                with torch.enable_grad():
                    _loss(model, chain.finish(number, hidden.clone()), share.batches[number], labels).backward()  # type: ignore[no-untyped-call]
                chain.put(number, _gradient(hidden))
    found = _zeros(linears, device)
    for index in reversed(course.order):
        prefix = f"{course.blocks.block_name(index)}."
        inside = [linear for linear in linears if linear.name.startswith(prefix)]

        def of_leaf(own: Sequence[int], index: int = index, inside: Sequence[Linear] = inside) -> Squares:
            sums = _zeros(inside, device)
            for number in own:
                check()
                hidden = shelf.get((index, number)).detach().requires_grad_()
                with torch.enable_grad(), _squaring(inside, sums):
                    chain.run_from(number, index, hidden.clone()).backward(chain.hidden(number))  # type: ignore[no-untyped-call]
                shelf.drop((index, number))
                chain.put(number, _gradient(hidden))
            return sums

        with in_memory(model, index, ahead=-1), _frozen(course.blocks.modules[index].parameters()):
            found |= _total(share, (of_leaf(own) for _, own in _by_leaf(share, numbers)))
    return found


def _samples(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first samples of `TOKENS` tokens together, each alone and cut to `LENGTH` tokens."""
    found: list[Batch] = []
    for batch in batches:
        for place in range(batch.shape[0]):
            if sum(sample.tokens for sample in found) >= TOKENS:
                return found
            sample = _cut(batch.part(torch.tensor([place])))
            found += [sample] if sample.tokens else []
    return found


def _cut(sample: Batch) -> Batch:
    inputs = {
        name: value[:, :LENGTH] if isinstance(value, torch.Tensor) and value.dim() > 1 else value
        for name, value in sample.inputs.items()
    }
    mask = sample.token_mask
    return replace(sample, inputs=inputs, token_mask=None if mask is None else mask[:, :LENGTH])


def _loss(model: nn.Module, output: Any, sample: Batch, labels: torch.Generator) -> torch.Tensor:
    """Return the cross-entropy of drawn labels, summed over the real tokens of a sample.

    Raises:
        ValueError: there are no logits of each token.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != sample.shape:
        raise ValueError(f"allocation: expected a model that returns the logits of each token, got {type(model).__name__}")
    real = (logits.flatten(0, 1) if sample.token_mask is None else logits[sample.token_mask]).float()
    drawn = torch.multinomial(real.detach().softmax(1).cpu(), 1, generator=labels).flatten().to(real.device)
    return functional.cross_entropy(real, drawn, reduction="sum")


def _labels(seed: int, leaf: int) -> torch.Generator:
    """Return the generator of the labels of a leaf."""
    return torch.Generator(device="cpu").manual_seed(derived_seed(seed, f"labels {leaf}" if leaf else "labels"))


def _by_leaf(share: Share, items: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield each leaf of this process with its part of `items`, one of which belongs to each of its samples."""
    for leaf in share.leaves:
        yield leaf, [item for item, sample in zip(items, share.batches, strict=True) if share.leaf_of(sample) == leaf]


def _total(share: Share, leaves: Iterator[Squares]) -> Squares:
    """Return the sums over all leaves of all processes."""

    def added(earlier: Squares, later: Squares) -> Squares:
        return {name: total.add_(later[name]) for name, total in earlier.items()}

    return total_of_leaves(share.world, leaves, added, lambda sums: [(total, False) for total in sums.values()])


def _zeros(linears: Sequence[Linear], device: torch.device) -> Squares:
    return {linear.name: torch.zeros(linear.shape[0] + 1, dtype=torch.float64, device=device) for linear in linears}


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    assert hidden.grad is not None
    return hidden.grad


@contextmanager
def _squaring(linears: Sequence[Linear], sums: Squares) -> Iterator[None]:
    """Add the squares of the gradient at the outputs of `linears` to `sums` within, summed over tokens."""
    plain, matrices = parted(linears)
    calls: list[ExpertsRun] = []
    with ExitStack() as stack:
        for linear in plain:
            for module in linear.modules:
                stack.callback(module.register_forward_hook(_hook(partial(_add, sums[linear.name]))).remove)
        for experts in experts_in(matrices):
            stack.callback(experts.module.register_forward_hook(_recording(experts, calls), with_kwargs=True).remove)
        yield
    for experts, call, gradient in calls:
        _add_of_experts(experts, call, gradient, sums)


def _add(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add the squares of a gradient `[..., features]`, and behind them the number of its rows that are not zero, as those of padding are."""
    squares = gradient.flatten(0, -2).double().square()
    total[:-1] += squares.sum(0)
    total[-1] += squares.any(1).sum()


def _hook(visit: Callable[[torch.Tensor], None]) -> Callable[..., torch.Tensor]:
    """Return a forward hook that calls `visit` with the gradient at an output."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_().clone()  # the model may change it in place
        output.register_hook(visit)
        return output

    return hook


def _recording(experts: Experts, calls: list[ExpertsRun]) -> Callable[..., torch.Tensor]:
    """Return a forward hook that adds the calls of fused experts to `calls`, as the gradient behind each is known."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        call = experts.call(args, kwargs)
        call = replace(call, hidden=call.hidden.detach(), weights=call.weights.detach())

        def visit(gradient: torch.Tensor) -> None:
            calls.append((experts, call, gradient.reshape(call.hidden.shape)))

        return _hook(visit)(module, args, output)

    return hook


def _add_of_experts(experts: Experts, call: ExpertsCall, gradient: torch.Tensor, sums: Squares) -> None:
    """Add the squares of the gradient at the outputs of each expert's matrices, for the gradient behind a call of all."""
    for expert, (rows, weights) in enumerate(call.by_expert(experts.count)):
        names = {part: experts.linear_name(expert, part) for part in experts.parts}
        if not len(rows) or not any(name in sums for name in names.values()):
            continue
        with torch.enable_grad():
            x = call.hidden[rows]
            outputs = {part: experts.linear(expert, part)(x).detach().requires_grad_() for part in experts.parts if part != DOWN}
            outputs[DOWN] = experts.linear(expert, DOWN)(experts.gated(outputs.get(GATE), outputs[UP]))
            output = experts.finished(outputs[DOWN]) * weights[:, None]
        gradients = torch.autograd.grad(output, list(outputs.values()), gradient[rows].to(output.dtype))
        for part, found in zip(outputs, gradients, strict=True):
            if names[part] in sums:
                _add(sums[names[part]], found)


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take no gradients of parameters within."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
