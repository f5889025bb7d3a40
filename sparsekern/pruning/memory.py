"""The memory of a streamed run: what it needs in any case, and what hidden states and the statistics of experts may take beside that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..methods import Method
from ..methods.statistics import Gram, Importance, Statistic, inputs_of
from ..models import Linear
from ..models.memory import Needs, forward_bytes, room_beside
from .batches import Batch
from .blockwise.experts import bytes_of, expert_of, is_expert
from .plan import Plan

COPIES = 4  # of a weight in float32 that solving it takes at most


@dataclass(frozen=True)
class Memory:
    """The limits of a run's memory, beside what it needs in any case.

    Attributes:
        hidden: bytes of hidden states that stay in memory; None is no limit.
        experts: bytes of the statistics of experts at once; None is no limit.
        folder: where the hidden states are kept that exceed the limit.
    """

    hidden: int | None = None
    experts: int | None = None
    folder: Path | None = None


def planned_memory(
    model: nn.Module,
    plan: object,
    method: Method,
    batches: Sequence[Batch],
    max_memory: int | str | None,
    folder: Path | None,
    own_leaves: int = 1,
) -> Memory:
    """Return the limits of a run within `max_memory`. What a run does not need is for hidden states first.

    Args:
        model: the streamed model.
        plan: what is pruned, and how forwards run.
        method: the method.
        batches: the calibration data.
        max_memory: see `sparsekern.prune`.
        folder: a folder for hidden states.
        own_leaves: leaves of the sums that this process adds, a power of two.

    Raises:
        ValueError: the limit is too low, or the hidden states of this model cannot leave the memory.
    """
    if max_memory is None:
        return Memory()
    needs = _needs(plan, method, own_leaves) if isinstance(plan, Plan) else {}
    needs[BATCH] = forward_bytes(model, max((math.prod(batch.shape) for batch in batches), default=0))
    room = room_beside(model, max_memory, needs)
    assert room is not None
    if isinstance(plan, Plan) and plan.course is not None and not plan.course.chain:
        raise ValueError(
            f"max_memory: expected None for {type(model).__name__}, whose blocks take more than the output of the one before, so the "
            "hidden states stay in memory"
        )
    one = needs.get(EXPERT, 0)
    return Memory(room // 2 if one else room, one + room // 2 if one else None, folder)


STATISTICS, EXPERT, SOLVING, BATCH = "the statistics of a block", "those of an expert", "solving a linear", "a batch in a block"


def _needs(plan: Plan, method: Method, own_leaves: int) -> Needs:
    needs: type[Statistic] | None = getattr(method, "needs", None)
    gathers = plan.course is not None
    grams = gathers and (needs is None or plan.measure_error or inputs_of(needs) is Gram)
    found = {STATISTICS: 0, EXPERT: 0, SOLVING: 0}
    for part in plan.parts:
        plain = [linear for linear in part if not is_expert(linear)]
        experts: dict[object, list[Linear]] = {}
        for linear in part:
            if is_expert(linear):
                experts.setdefault((expert_of(linear).experts.name, expert_of(linear).expert), []).append(linear)
        sizes = [linear.weight.shape.numel() for linear in part]
        found[SOLVING] = max([found[SOLVING], *(4 * COPIES * size for size in sizes)])
        if gathers:
            found[STATISTICS] = max(found[STATISTICS], _statistics(plan, plain, needs, grams, own_leaves))
            found[EXPERT] = max([found[EXPERT], *(bytes_of(own, needs, plan.measure_error) for own in experts.values())])
    return found


def _statistics(plan: Plan, linears: Sequence[Linear], needs: type[Statistic] | None, grams: bool, own_leaves: int) -> int:
    """Return the bytes of the statistics of the linears of a block with modules of their own, with factors or partial sums."""
    parts = own_leaves.bit_length()  # of a sum in a tree, with the current leaf
    assert plan.course is not None
    inputs = {(plan.course.input_of(linear.name), linear.features) for linear in linears}
    total = sum(4 * features**2 * max(2, parts) if grams else 4 * features * parts for _, features in inputs)
    if needs is not None and issubclass(needs, Importance):
        total += sum(4 * linear.weight.numel() * parts for linear in linears)
    return total
