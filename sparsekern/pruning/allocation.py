"""Shares of zeros by linear, allocated before a block-wise run: each linear's error at several shares, times how much the loss minds it.

How much it minds is the mean square of the loss's gradient at each output, see `gradient_squares.py`. The errors are those of SparseGPT on
the inputs in the dense model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..methods import Gram, SparseGPT
from ..methods.allocation import MIXED, UNIFORM, Curve, allocated_levels, allocated_zeros
from ..methods.statistics import InputStatistic
from ..models import Linear
from ..models.limits import vocabulary
from ..models.memory import forward_bytes, room_beside, score_bytes
from ..models.streaming import in_memory, stream_of
from ..pattern import NM, Pattern, Unstructured, pruned_count, share_with_zeros
from ..ranks import World, deal
from .batches import Batch
from .blockwise.activations import Activations
from .blockwise.dealt_experts import DealtExperts
from .blockwise.experts import ExpertStatistics, expert_bytes, is_expert
from .blockwise.gathering import Gathering
from .blockwise.shares import LeafSums, Share
from .blockwise.statistics import SharedStatistics
from .corrections import NONE
from .gradient_squares import LENGTH, backward_bytes, gradient_squares
from .memory import Memory, planned_memory
from .plan import Plan, Request

REACH = 0.15  # that a share may differ from the one asked for; an N may differ by 1 in any case
LEVELS = 5  # of each curve
Group = tuple[list[Linear], InputStatistic]  # linears with the same inputs, and the statistic of these
GRADIENTS = 3  # times the inputs and outputs of a block's matrices, of a sample that runs with gradients


def allocatable(model: nn.Module, plan: Plan, allocation: str, optional: Collection[str] = ()) -> Plan:
    """Return the plan whose shares of zeros `with_allocation` is to decide. An allocation in `optional` is left out where it cannot be.

    Raises:
        ValueError: no linear of a block has a pattern that the allocation decides; or a streamed model whose blocks take more than the
            output of the one before.
    """
    assert plan.course is not None
    allocated = replace(plan, allocation=allocation)
    if not any(plan.block_linears):
        raise ValueError(f"allocation: expected {UNIFORM!r} where no linear of a block is pruned, got {allocation!r}")
    shown = ", ".join(sorted(set(map(str, plan.patterns.values()))))
    if not (chosen := _chosen(allocated)):
        raise ValueError(
            f"allocation: expected {UNIFORM!r} for pattern {shown}, which is no share of zeros, or {MIXED!r}, which gives each linear "
            f"an N of its own, got {allocation!r}"
        )
    if not _movable({plan.patterns[linear.name] for linear in chosen}):
        raise ValueError(
            f"allocation: expected {UNIFORM!r} for pattern {shown}, to which no N on its other side exists, got {allocation!r}"
        )
    if stream_of(model) is not None and not plan.course.chain:
        why = "for a streamed model whose blocks take more than the output of the one before"
        if "allocation" in optional:
            return replace(plan, left_out=(*plan.left_out, f"allocation {why}"))
        raise ValueError(f"allocation: expected {UNIFORM!r} {why} (load it without stream=True), got {allocation!r}")
    return allocated


def with_allocation(model: nn.Module, plan: Plan, batches: Sequence[Batch], request: Request) -> Plan:
    """Return the plan with a share of zeros of its own for each linear whose pattern is a share. The sum of all zeros stays.

    The allocation `MIXED` also gives each linear with a pattern N:M an N of its own. Then the zeros of all linears of one M stay.

    Experts that no calibration token reaches, and linears whose outputs have no gradient, keep the share of their pattern.

    Several processes share the work, and all of them call this.

    Args:
        model: the dense model, ready to run.
        plan: the linears, their patterns, and the course of the forwards, as `allocatable` returns it.
        batches: the calibration data.
        request: `seed` draws the labels, `leaves` is the number of parts of each sum, and `max_memory` and `folder` are for what is kept of
            a streamed model.

    Raises:
        ValueError: a model without logits, a gradient that is NaN or Inf, or `max_memory` is too low.
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
        listed=plan.listed,
        world=world,
        leaves=request.leaves,
        streamed=(plan.course, backward.shelf(model)) if streamed else None,
    )
    for name, found in squares.items():
        if not torch.isfinite(found).all():
            raise ValueError(
                f"allocation: expected finite gradients, got NaN or Inf at the outputs of {name}; run the model in float32 or bfloat16"
            )
    squares = with_means(plan, squares)
    reached = [linear for linear in chosen if linear.name in squares]
    if not reached:
        return plan
    curves = cost_curves(model, plan, reached, batches, squares, world=world, leaves=request.leaves, memory=curves_memory)
    names = [linear.name for linear in reached if linear.name in curves]
    return replace(plan, patterns=plan.patterns | allocated_patterns({name: plan.patterns[name] for name in names}, curves))


def allocated_patterns(patterns: Mapping[str, Pattern], curves: Mapping[str, Curve]) -> dict[str, Pattern]:
    """Return the patterns of least cost with the zeros of `patterns`: all shares together, and all N:M of one M.

    Args:
        patterns: the pattern that is asked for, by the name of each linear.
        curves: the cost of each linear.
    """
    found: dict[str, Pattern] = {}
    kinds: dict[int | None, list[str]] = {}
    for name, pattern in patterns.items():
        kinds.setdefault(pattern.m if isinstance(pattern, NM) else None, []).append(name)
    for m, names in kinds.items():
        own = [curves[name] for name in names]
        asked = [_zeros(patterns[name], curve.weights) for name, curve in zip(names, own, strict=True)]
        zeros = allocated_zeros(own, sum(asked)) if m is None else allocated_levels(own, asked)
        for name, curve, count in zip(names, own, zeros, strict=True):
            found[name] = share_with_zeros(count, curve.weights) if m is None else NM(m - count * m // curve.weights, m)
    return found


def _movable(patterns: Collection[Pattern]) -> bool:
    """Return whether some of these patterns can have more zeros while others have fewer."""
    kinds: dict[int, set[NM]] = {}
    for pattern in patterns:
        if not isinstance(pattern, NM):
            return True
        kinds.setdefault(pattern.m, set()).add(pattern)
    return any(len(kind) > 1 or 1 < next(iter(kind)).n < m - 1 for m, kind in kinds.items())


def _zeros(pattern: Pattern, weights: int) -> int:
    """Return how many of some weights are zero by a pattern."""
    return weights // pattern.m * (pattern.m - pattern.n) if isinstance(pattern, NM) else pruned_count(weights, pattern.sparsity)


def _chosen(plan: Plan) -> list[Linear]:
    """Return the linears of blocks whose patterns the allocation decides."""
    kinds = (Unstructured, NM) if plan.allocation == MIXED else Unstructured
    return [linear for linears in plan.block_linears for linear in linears if isinstance(plan.patterns[linear.name], kinds)]


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


def with_means(plan: Plan, squares: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the squares with those of experts that the tokens of `gradient_squares` did not reach: the mean of their layer's others."""
    found = dict(squares)
    for linears in plan.block_linears:
        alike: dict[object, list[str]] = {}
        for linear in linears:
            if linear.name in plan.listed or is_expert(linear):
                alike.setdefault((linear.name.rpartition(".")[2], linear.shape), []).append(linear.name)
        for names in alike.values():
            known = [squares[name] for name in names if name in squares]
            if known and len(known) < len(names):
                found |= dict.fromkeys(set(names).difference(squares), torch.stack(known).mean(0))
    return found


def cost_curves(
    model: nn.Module,
    plan: Plan,
    linears: Sequence[Linear],
    batches: Sequence[Batch],
    squares: Mapping[str, torch.Tensor],
    *,
    world: World,
    leaves: int = 1,
    memory: Memory | None = None,
) -> dict[str, Curve]:
    """Return the cost of each linear at several shares of zeros, by name; none of one that no token reaches. All processes call this.

    Args:
        model: the model, ready to run.
        plan: the patterns, and the course of the forwards.
        linears: the linears of its blocks to measure.
        batches: the calibration data.
        squares: the mean squares of the gradient, by name.
        world: the processes, which share the batches.
        leaves: the number of parts of each sum.
        memory: the limits of the hidden states and of the statistics of experts; None is no limit.
    """
    course, memory = plan.course, memory or Memory()
    assert course is not None
    curves: dict[str, Curve] = {}
    chosen = {linear.name for linear in linears}
    of_block = {index: [linear for linear in plan.block_linears[index] if linear.name in chosen] for index in course.order}
    last = [index for index in course.order if of_block[index]][-1]
    share = Share(world, batches, leaves)
    activations = Activations(model, share.batches, course, memory.shelf(model))
    for index in course.order:
        with in_memory(model, index, ahead=int(index != last)):
            if own := of_block[index]:
                groups = _groups(Gathering(plan, index, own), activations, share, batches, leaves, memory)
                curves |= _curves(world, groups, plan.patterns, squares)
            if index == last:
                break
            activations.advance(index, world.check)
    return curves


def _groups(
    gathering: Gathering, activations: Activations, share: Share, batches: Sequence[Batch], leaves: int, memory: Memory
) -> Iterator[Group]:
    """Yield the sets of linears with the same inputs that are dealt to this process, and their statistics. All processes call this."""
    world, masks = share.world, gathering.masks
    summed = LeafSums(partial(SharedStatistics, gathering.plain, Gram, masks=gathering.recorded_masks), share)
    routed = ExpertStatistics(gathering.matrices, Gram, False, masks=masks, shelf=activations.shelf)
    for batch, inputs, calls in gathering.inputs(activations):
        world.check()
        summed.of(batch).add(batch, inputs)
        routed.add(batch, calls)
    groups = summed.result().groups
    costs = [_multiply_adds(members) for members, _ in groups]
    yield from (groups[number] for number in deal(costs, world.size)[world.rank])
    del groups
    if not gathering.experts:
        return
    most = expert_bytes(gathering.experts[0].device, memory.experts)
    if leaves == 1:
        experts = routed.groups(most)
    else:
        dealt = DealtExperts(routed, world, batches, most)
        experts = map(dealt.statistics, zip_longest(*dealt.packs(leaves)))
    for some in experts:
        while some:  # the statistics of one are gone before the next are made
            yield from some.pop(0).groups


def _curves(
    world: World, groups: Iterable[Group], patterns: Mapping[str, Pattern], squares: Mapping[str, torch.Tensor]
) -> dict[str, Curve]:
    """Return the curves of all linears of a block, each of which is in a group of one process."""
    solver, found = SparseGPT(), []
    for members, gram in groups:
        for linear in members if gram.tokens else ():
            world.check()
            curve = _curve(solver, linear, gram, patterns[linear.name], squares[linear.name])
            found.append([linear.name, curve.weights, list(curve.zeros), list(curve.costs)])
    return {name: Curve(*curve) for part in world.gather("cost curves", found) for name, *curve in part}


def _multiply_adds(linears: Sequence[Linear]) -> float:
    """Return what the curves of linears with the same inputs take: a factor, and a sweep for each level."""
    features = linears[0].features
    return float(features**3 + LEVELS * sum(linear.shape[0] for linear in linears) * features**2)


def _curve(solver: SparseGPT, linear: Linear, gram: Any, pattern: Pattern, squares: torch.Tensor) -> Curve:
    zeros, costs = [], []
    for level in _levels(pattern):
        zeros.append(_zeros(level, linear.weight.numel()))
        found = solver.solve(linear.weight, gram, level).row_error
        assert found is not None
        costs.append(float((found * squares).sum()))
    return Curve(linear.weight.numel(), zeros, costs)


def _levels(pattern: Pattern) -> list[Pattern]:
    """Return the patterns around one whose costs are measured, by rising zeros."""
    if isinstance(pattern, NM):
        reach = max(1, int(REACH * pattern.m))
        half = min(reach, LEVELS // 2)
        steps = {round(reach * place / half) for place in range(-half, half + 1)}
        return [NM(pattern.n - step, pattern.m) for step in sorted(steps) if 0 < pattern.n - step < pattern.m]
    lowest, highest = max(pattern.sparsity - REACH, 0.0), min(pattern.sparsity + REACH, (1 + pattern.sparsity) / 2)
    shares = {lowest + (highest - lowest) * place / (LEVELS - 1) for place in range(LEVELS)}
    return [Unstructured(share) for share in sorted({pattern.sparsity, *shares})]
