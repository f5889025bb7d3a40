"""Shares of zeros by linear, allocated before a block-wise run: each linear's error at several shares, times how much the loss minds it.

How much it minds is the mean square of the loss's gradient at each output, see `gradient_squares.py`. The errors are those of SparseGPT on
the inputs in the dense model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..methods import Gram, SparseGPT
from ..methods.allocation import FISHER, UNIFORM, Curve, allocated_zeros
from ..models import Linear
from ..models.limits import vocabulary
from ..models.memory import forward_bytes, room_beside, score_bytes
from ..models.streaming import in_memory, stream_of
from ..pattern import Pattern, Unstructured, pruned_count, share_with_zeros
from ..ranks import World, deal
from .batches import Batch
from .blockwise.activations import Activations
from .blockwise.shares import LeafSums, Share
from .blockwise.shelf import Shelf
from .blockwise.statistics import SharedStatistics
from .corrections import NONE
from .gradient_squares import LENGTH, backward_bytes, gradient_squares
from .memory import Memory, planned_memory
from .plan import Plan, Request

REACH = 0.15  # that a share may differ from the one asked for
LEVELS = 5  # of each curve
GRADIENTS = 3  # times the inputs and outputs of a block's matrices, of a sample that runs with gradients


def allocatable(model: nn.Module, plan: Plan, optional: Collection[str] = ()) -> Plan:
    """Return the plan whose shares of zeros `with_allocation` is to decide. An allocation in `optional` is left out where it cannot be.

    Raises:
        ValueError: no linear of a block has a share of zeros for pattern; experts; or a streamed model whose blocks take more than the
            output of the one before.
    """
    assert plan.course is not None
    if plan.has_experts:
        raise ValueError(
            f"allocation: expected {UNIFORM!r} for a mixture, most of whose experts a few tokens do not reach, got {FISHER!r}"
        )
    if not _chosen(plan):
        shown = ", ".join(sorted(set(map(str, plan.patterns.values()))))
        raise ValueError(f"allocation: expected {UNIFORM!r} for pattern {shown}, which is no share of zeros, got {FISHER!r}")
    if stream_of(model) is not None and not plan.course.chain:
        why = "for a streamed model whose blocks take more than the output of the one before"
        if "allocation" in optional:
            return replace(plan, left_out=(*plan.left_out, f"allocation {why}"))
        raise ValueError(f"allocation: expected {UNIFORM!r} {why} (load it without stream=True), got {FISHER!r}")
    return replace(plan, allocation=FISHER)


def with_allocation(model: nn.Module, plan: Plan, batches: Sequence[Batch], request: Request) -> Plan:
    """Return the plan with a share of zeros of its own for each linear whose pattern is a share. The sum of all zeros stays.

    Several processes share the work, and all of them call this.

    Args:
        model: the dense model, ready to run.
        plan: the linears, their patterns, and the course of the forwards, as `allocatable` returns it.
        batches: the calibration data.
        request: `seed` draws the labels, `leaves` is the number of parts of each sum, and `max_memory` and `folder` are for what is kept of
            a streamed model.

    Raises:
        ValueError: a model without logits; or `max_memory` is too low.
    """
    assert plan.course is not None
    chosen, streamed = _chosen(plan), stream_of(model) is not None
    world = World.current()
    backward, curves_memory = _memories(model, plan, batches, request, world)
    squares = gradient_squares(
        model,
        chosen,
        batches,
        request.seed,
        world=world,
        leaves=request.leaves,
        streamed=(plan.course, backward.shelf(model)) if streamed else None,
    )
    share = Share(world, batches, request.leaves)
    curves = cost_curves(model, plan, chosen, share, squares, curves_memory.shelf(model))
    names = [linear.name for linear in chosen]
    budget = sum(pruned_count(curves[linear.name].weights, plan.patterns[linear.name].sparsity) for linear in chosen)
    zeros = allocated_zeros([curves[name] for name in names], budget)
    shares: dict[str, Pattern] = {
        name: share_with_zeros(count, curves[name].weights) for name, count in zip(names, zeros, strict=True)
    }
    return replace(plan, patterns=plan.patterns | shares)


def _chosen(plan: Plan) -> list[Linear]:
    """Return the linears of blocks whose pattern is a share of zeros."""
    return [linear for linears in plan.block_linears for linear in linears if isinstance(plan.patterns[linear.name], Unstructured)]


def _memories(model: nn.Module, plan: Plan, batches: Sequence[Batch], request: Request, world: World) -> tuple[Memory, Memory]:
    """Return the limits of the backward pass, and those of the error curves.

    Raises:
        ValueError: `max_memory` is too low for one of them.
    """
    if request.max_memory is None:
        return Memory(), Memory()
    needs = {
        "the gradients of a block": GRADIENTS * (forward_bytes(model, LENGTH) + score_bytes(model, 1, LENGTH)),
        "the logits of a sample": backward_bytes(vocabulary(model) or 0),
    }
    backward = Memory(room_beside(model, request.max_memory, needs), None, request.folder)
    alone = replace(plan, correction=NONE, tune=None)
    leaves = request.leaves // world.size
    limit, folder = request.max_memory, request.folder
    return backward, planned_memory(model, alone, SparseGPT(), batches, limit, folder, leaves, ranks=world.size)


def cost_curves(
    model: nn.Module,
    plan: Plan,
    linears: Sequence[Linear],
    share: Share,
    squares: Mapping[str, torch.Tensor],
    shelf: Shelf | None = None,
) -> dict[str, Curve]:
    """Return the cost of each linear at several shares of zeros, by name. All processes call this.

    Args:
        model: the model, ready to run.
        plan: the patterns, and the course of the forwards.
        linears: the linears of its blocks to measure.
        share: the calibration data of this process.
        squares: the mean squares of the gradient, by name.
        shelf: holds the hidden states; None keeps them in memory.
    """
    course, world = plan.course, share.world
    assert course is not None
    curves: dict[str, Curve] = {}
    chosen = {linear.name for linear in linears}
    of_block = {index: [linear for linear in plan.block_linears[index] if linear.name in chosen] for index in course.order}
    last = [index for index in course.order if of_block[index]][-1]
    activations = Activations(model, share.batches, course, shelf)
    for index in course.order:
        own = of_block[index]
        masks = {linear.name: course.masks(linear.name, index) for linear in own}
        order = [name for name in course.calls(index) if name in masks]
        with in_memory(model, index, ahead=int(index != last)):
            if own:
                summed = LeafSums(partial(SharedStatistics, own, Gram, masks=masks), share)
                for batch, inputs, _ in activations.inputs_of(index, own, order):
                    world.check()
                    summed.of(batch).add(batch, inputs)
                curves |= _curves(world, summed.result(), plan.patterns, squares)
            if index == last:
                break
            activations.advance(index, world.check)
    return curves


def _curves(
    world: World, shared: SharedStatistics, patterns: Mapping[str, Pattern], squares: Mapping[str, torch.Tensor]
) -> dict[str, Curve]:
    """Return the curves of the linears of a block. Each process makes those of some sets of linears with the same inputs."""
    costs = [_multiply_adds(members) for members, _ in shared.groups]
    solver, found = SparseGPT(), []
    for number in deal(costs, world.size)[world.rank]:
        members, gram = shared.groups[number]
        for linear in members:
            world.check()
            curve = _curve(solver, linear, gram, patterns[linear.name], squares[linear.name])
            found.append([linear.name, curve.weights, list(curve.zeros), list(curve.costs)])
    return {name: Curve(*curve) for part in world.gather("cost curves", found) for name, *curve in part}


def _multiply_adds(linears: Sequence[Linear]) -> float:
    """Return what the curves of linears with the same inputs take: a factor, and a sweep for each level."""
    features = linears[0].features
    return float(features**3 + LEVELS * sum(linear.shape[0] for linear in linears) * features**2)


def _curve(solver: SparseGPT, linear: Linear, gram: Any, pattern: Pattern, squares: torch.Tensor) -> Curve:
    count = linear.weight.numel()
    lowest, highest = max(pattern.sparsity - REACH, 0.0), min(pattern.sparsity + REACH, (1 + pattern.sparsity) / 2)
    shares = sorted({pattern.sparsity, *(lowest + (highest - lowest) * place / (LEVELS - 1) for place in range(LEVELS))})
    zeros, costs = [], []
    for share in shares:
        zeros.append(pruned_count(count, share))
        found = solver.solve(linear.weight, gram, Unstructured(share)).row_error
        assert found is not None
        costs.append(float((found * squares).sum()))
    return Curve(count, zeros, costs)
