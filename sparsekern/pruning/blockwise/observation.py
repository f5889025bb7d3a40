"""Observe the forwards of a model before any work: what cannot be pruned is left out of the plan and said, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ...models import Blocks, Linear
from ...models.streaming import lent_blocks
from ..batches import Batch
from ..plan import Plan, shortened
from ..progress import Notices
from .course import Course
from .experts import experts_in
from .lineage import ARGUMENT, Element
from .trace import Trace, observe


def observed(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> Plan:
    """Run one sample of each kind of batch. Return the plan with the course of the forwards, without linears that they do not call.

    Args:
        model: the model, ready to run.
        plan: the linears to prune.
        batches: the calibration data.

    Raises:
        ValueError: the forward refuses a batch, or does what cannot be followed; or no linear is left.
    """
    traces = _traces(model, plan.blocks, plan.linears, batches, to_the_end=bool(plan.outside_linears))
    plan = _without_unseen(plan, list(traces.values()))
    for batch in batches:
        for linear in plan.linears:
            if linear.name in traces[batch.given].unclear and (batch.token_mask is not None or batch.decoder_mask is not None):
                raise ValueError(f"{linear.name}: {traces[batch.given].unclear[linear.name]}")
    called = {name for trace in traces.values() for names in trace.calls.values() for name in names}
    for experts in experts_in(plan.linears):
        if experts.name not in called:
            raise ValueError(
                f"model: a forward did not call {experts.name} ({type(experts.module).__name__}), so the inputs of its experts are "
                "unknown; leave them out with exclude"
            )
    planned = {index for index, linears in enumerate(plan.block_linears) if linears}
    return replace(plan, course=_course(plan.blocks, planned, traces))


def course_of(model: nn.Module, blocks: Blocks, batches: Sequence[Batch], linears: Sequence[Sequence[Linear]]) -> Course:
    """Run one sample of each kind of batch, and return the course of the forwards through the blocks that hold `linears`.

    Args:
        model: the model, ready to run.
        blocks: its blocks.
        batches: the calibration data.
        linears: for each block, the linears whose inputs are wanted.

    Raises:
        ValueError: the forward refuses a batch, or does what cannot be followed.
    """
    traces = _traces(model, blocks, [linear for found in linears for linear in found], batches, to_the_end=False)
    return _course(blocks, {index for index, found in enumerate(linears) if found}, traces)


def _traces(
    model: nn.Module, blocks: Blocks, linears: Sequence[Linear], batches: Sequence[Batch], *, to_the_end: bool
) -> dict[frozenset[str], Trace]:
    traces: dict[frozenset[str], Trace] = {}
    with lent_blocks(model):
        for number, batch in enumerate(batches):
            if batch.given not in traces:
                traces[batch.given] = observe(model, blocks, linears, batch, number, to_the_end=to_the_end)
    return traces


def check_complete(plan: Plan, batches: Sequence[Batch]) -> None:
    """Raise `ValueError` unless every block with linears to prune is run by some batch.

    Args:
        plan: a plan that `observed` made for these and other batches.
        batches: the batches.
    """
    course = plan.course
    assert course is not None
    ran = {index for batch in batches for index in course.traces[batch.given].order}
    for index, linears in enumerate(plan.block_linears):
        if linears and index not in ran:
            raise ValueError(
                f"calibration: expected batches that run {plan.blocks.block_name(index)}, as other datasets do; leave it out "
                "with exclude"
            )


def _without_unseen(plan: Plan, traces: list[Trace]) -> Plan:
    """Return the plan without linears of blocks that never run, and without those that are never called, and say which they are."""
    ran = {run.index for trace in traces for run in trace.runs}
    called = {name for trace in traces for names in trace.calls.values() for name in names}
    read = {name for trace in traces for name in trace.read} - called
    otherwise = {name for trace in traces for name in trace.otherwise}
    notices = Notices()
    idle = [plan.blocks.block_name(i) for i, linears in enumerate(plan.block_linears) if linears and i not in ran]
    if idle:
        notices.once("idle", f"{shortened(idle)}: the calibration batches do not run this block, so it stays dense")
    uncalled = [linear.name for linear in plan.linears if linear.name in read]
    if uncalled:
        notices.once(
            "uncalled",
            f"{shortened(uncalled)}: the model reads this weight without calling the layer, so its inputs are not known and it stays dense",
        )

    if odd := [linear.name for linear in plan.linears if linear.name in otherwise]:
        notices.once(
            "otherwise",
            f"{shortened(odd)}: it computes something else than the product of its inputs and its weight, such as one by groups, so it "
            "stays dense",
        )

    def kept(linears: Sequence[Linear]) -> tuple[Linear, ...]:
        return tuple(linear for linear in linears if linear.name not in read | otherwise)

    block_linears = tuple(kept(linears) if i in ran else () for i, linears in enumerate(plan.block_linears))
    plan = replace(plan, block_linears=block_linears, outside_linears=kept(plan.outside_linears))
    if not plan.linears:
        raise ValueError("calibration: expected batches that run the linears to prune; they run none of them")
    return replace(plan, patterns={linear.name: plan.patterns[linear.name] for linear in plan.linears})


def _course(blocks: Blocks, planned: set[int], traces: dict[frozenset[str], Trace]) -> Course:
    stacks, start = [], 0
    for stack in blocks.stacks:
        stacks.append(range(start, start + len(stack.modules)))
        start += len(stack.modules)
    chosen = [stack for stack in stacks if planned & set(stack)]
    found = list(traces.values())
    for indices in chosen:
        for trace in found:
            _check_runs(blocks, trace, indices)
    if len(chosen) <= 1 and all(_is_chain(trace, set(chosen[0]) if chosen else set()) for trace in found):
        orders = [tuple(index for index in trace.order if chosen and index in chosen[0]) for trace in found]
        if all(order == orders[0] for order in orders):
            return Course(blocks, traces, orders[0], chain=True)
    followed = {index for stack in stacks if stack in chosen or all(_runs_once(trace, stack) for trace in found) for index in stack}
    for trace in found:
        for first, second in trace.hidden:
            if first in followed and second in followed:
                raise ValueError(
                    f"model: {blocks.block_name(second)} reads a tensor that {blocks.block_name(first)} made and that is not "
                    "among its arguments, which block-by-block pruning cannot follow"
                )
    return Course(blocks, traces, _merged([[index for index in trace.order if index in followed] for trace in found]), chain=False)


def _runs_once(trace: Trace, stack: Sequence[int]) -> bool:
    """Return whether no block of a stack runs twice or changes its arguments."""
    order = [index for index in trace.order if index in stack]
    return len(set(order)) == len(order) and not any(Element(index, ARGUMENT) in trace.overwritten for index in order)


def _check_runs(blocks: Blocks, trace: Trace, stack: Sequence[int]) -> None:
    """Raise `ValueError` that names the first block of a stack that runs twice or changes its arguments."""
    for index in trace.order:
        if index not in stack:
            continue
        name, times = blocks.block_name(index), trace.order.count(index)
        if times > 1:
            raise ValueError(
                f"model: a forward runs {name} more than once ({times} times), which block-by-block pruning cannot follow"
            )
        if Element(index, ARGUMENT) in trace.overwritten:
            raise ValueError(f"model: {name} changes its input in place, which block-by-block pruning cannot follow")


def _is_chain(trace: Trace, stack: set[int]) -> bool:
    """Return whether the blocks of a stack hand on one tensor, which nothing else uses or changes."""
    runs = [run for run in trace.runs if run.index in stack]
    following = {run.index: after.index for run, after in zip(runs, runs[1:], strict=False)}
    if not all(run.plain and run.has_hidden for run in runs) or not all(run.chained for run in runs[1:]):
        return False
    if len({run.returns_tuple for run in runs}) > 1 or any(element.block in stack for element in trace.overwritten):
        return False
    for element, users in trace.users.items():
        if element.block in stack and not users & stack <= {following.get(element.block)}:
            return False
    if any(first in stack and second in stack for first, second in trace.hidden):
        return False
    last = Element(runs[-1].index, 0) if runs else None
    return all(element == last for element in trace.outside if element.block in stack)


def _merged(orders: list[list[int]]) -> tuple[int, ...]:
    """Return one order that all orders agree with.

    Raises:
        ValueError: they do not agree.
    """
    merged: list[int] = []
    for order in orders:
        place = 0
        for index in order:
            if index in merged:
                place = merged.index(index) + 1
            else:
                merged.insert(place, index)
                place += 1
    for order in orders:
        if [index for index in merged if index in order] != order:
            raise ValueError("model: calibration batches run the blocks in different orders, which pruning cannot follow")
    return tuple(merged)
