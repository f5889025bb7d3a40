"""The memory of a streamed run: what it needs in any case, and what hidden states and the statistics of experts may take beside that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..methods import LinearMethod, Method
from ..methods.statistics import Gram, Importance, Statistic, inputs_of
from ..models import Linear
from ..models.memory import Needs, forward_bytes, room_beside
from .batches import Batch
from .blockwise.experts import bytes_of, expert_of, is_expert
from .corrections import NONE
from .experts.plan import ExpertPlan
from .plan import Plan

DRIFTS = 5  # square matrices of a corrected stage: two Gram matrices, two cross products and a factor
ENERGY = 8  # bytes for each entry of a factor: its norm is taken in float64


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
    *,
    has_state: bool = False,
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
        has_state: a run over several datasets, which reads and keeps weights and totals in a state.

    Raises:
        ValueError: the limit is too low, or the hidden states of this model cannot leave the memory.
    """
    if max_memory is None:
        return Memory()
    course, solved = (plan.course, plan) if isinstance(plan, Plan) else (None, None)
    if isinstance(plan, ExpertPlan):
        course, solved, method = plan.course, plan.then, plan.request.then or method
    needs = {} if solved is None else _needs(solved, method, own_leaves)
    if solved is not None and has_state:
        weights = max(sum(linear.weight.nbytes for linear in part) for part in solved.parts)
        needs[STATE] = STATE_COPIES * weights + needs[STATISTICS]  # and the totals of the datasets before
    needs[BATCH] = forward_bytes(model, max((math.prod(batch.shape) for batch in batches), default=0))
    room = room_beside(model, max_memory, needs, edited=has_state)
    assert room is not None
    if course is not None and not course.chain:
        raise ValueError(
            f"max_memory: expected None for {type(model).__name__}, whose blocks take more than the output of the one before, so the "
            "hidden states stay in memory"
        )
    if not (one := needs.get(EXPERT, 0)):
        return Memory(room, None, folder)
    assert solved is not None
    share = min(_statistics_of_expert(own, method, solved) / _bytes_of_expert(own, method, solved) for own in _experts(solved))
    return Memory(room // 2, int((one + room // 2) * share), folder)


STATISTICS, EXPERT, SOLVING, BATCH = "the statistics of a block", "those of an expert", "solving a linear", "a batch in a block"
STATE = "what the state holds of a block"
STATE_COPIES = 2  # of a block's weights, beside that of a block that is changed: of other steps, or pruned ones


def _needs(plan: Plan, method: Method, own_leaves: int) -> Needs:
    needs: type[Statistic] | None = getattr(method, "needs", None)
    gathers = plan.course is not None
    grams = gathers and (needs is None or plan.measure_error or plan.correction != NONE or inputs_of(needs) is Gram)
    found = {STATISTICS: 0, EXPERT: 0, SOLVING: 0}
    for part in plan.parts:
        plain = [linear for linear in part if not is_expert(linear)]
        found[SOLVING] = max([found[SOLVING], *(_solving(linear, method, plan) for linear in part)])
        if gathers:
            found[STATISTICS] = max(found[STATISTICS], _statistics(plan, plain, needs, grams, own_leaves))
    if gathers:
        found[EXPERT] = max([0, *(_bytes_of_expert(own, method, plan) for own in _experts(plan))])
    return found


def _solving(linear: Linear, method: Method, plan: Plan) -> int:
    """Return the bytes that solving a linear and measuring its error take at most."""
    assert isinstance(method, LinearMethod)
    rows, features = linear.shape
    return max(method.solving_bytes(rows, features), ENERGY * features**2 if plan.measure_error else 0)


def _experts(plan: Plan) -> list[list[Linear]]:
    """Return the matrices of each fused expert."""
    found: dict[object, list[Linear]] = {}
    for linear in plan.linears:
        if is_expert(linear):
            found.setdefault((expert_of(linear).experts.name, expert_of(linear).expert), []).append(linear)
    return list(found.values())


def _statistics_of_expert(own: Sequence[Linear], method: Method, plan: Plan) -> int:
    return max(1, bytes_of(own, getattr(method, "needs", None), plan.measure_error))


def _bytes_of_expert(own: Sequence[Linear], method: Method, plan: Plan) -> int:
    """Return the bytes of the statistics of an expert, and of solving its matrices together with those of others."""
    return _statistics_of_expert(own, method, plan) + max(_solving(linear, method, plan) for linear in own)


def _statistics(plan: Plan, linears: Sequence[Linear], needs: type[Statistic] | None, grams: bool, own_leaves: int) -> int:
    """Return the bytes of the statistics of the linears of a block with modules of their own, with factors or partial sums."""
    parts = own_leaves.bit_length()  # of a sum in a tree, with the current leaf
    assert plan.course is not None
    if plan.correction != NONE:  # of one stage at a time
        return max((DRIFTS * 4 * linear.features**2 for linear in linears), default=0)
    inputs = {(plan.course.input_of(linear.name), linear.features) for linear in linears}
    total = sum(4 * features**2 * max(2, parts) if grams else 4 * features * parts for _, features in inputs)
    if needs is not None and issubclass(needs, Importance):
        total += sum(4 * linear.weight.numel() * parts for linear in linears)
    return total
