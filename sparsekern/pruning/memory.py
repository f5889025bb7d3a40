"""The memory of a streamed run: what it needs in any case, and what hidden states and the statistics of experts may take beside that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..methods import BlockMethod, LinearMethod, Method
from ..methods.statistics import Gram, Importance, Statistic, inputs_of
from ..models import Linear
from ..models.memory import Needs, forward_bytes, room_beside, score_bytes
from .batches import Batch
from .blockwise.carried import carrier_for
from .blockwise.course import Course
from .blockwise.experts import bytes_of, expert_of, is_expert
from .blockwise.lineage import Element
from .blockwise.messages import MESSAGE
from .blockwise.shelf import Shelf
from .blockwise.trace import Slot
from .corrections import NONE
from .experts.plan import ExpertPlan
from .plan import Plan
from .values import replaced

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

    def shelf(self, model: nn.Module) -> Shelf:
        """Return an empty shelf for the hidden states of a model."""
        carrier = None if self.hidden is None else carrier_for(next(model.parameters()).device)
        return Shelf(self.hidden, self.folder, carrier)


def planned_memory(
    model: nn.Module,
    plan: object,
    method: Method,
    batches: Sequence[Batch],
    max_memory: int | str | None,
    folder: Path | None,
    own_leaves: int = 1,
    *,
    ranks: int = 1,
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
        ranks: the number of processes.
        has_state: a run over several datasets, which reads and keeps weights and totals in a state.

    Raises:
        ValueError: the limit is too low.
    """
    if max_memory is None:
        return Memory()
    course, solved = (plan.course, plan) if isinstance(plan, Plan) else (None, None)
    if isinstance(plan, ExpertPlan):
        course, solved, method = plan.course, plan.then, plan.request.then or method
    needs = {} if solved is None else _needs(solved, method, own_leaves, ranks)
    if solved is not None and has_state:
        weights = max(sum(linear.weight.nbytes for linear in part) for part in solved.parts)
        needs[STATE] = STATE_COPIES * weights + needs[STATISTICS]  # and the totals of the datasets before
    needs[BATCH] = _bytes_of_forward(model, course, batches)
    if course is not None and not course.chain:
        needs[HANDED] = max((_handed_on(course, batch, batches) for batch in _shapes_of(batches)), default=0)
    room = room_beside(model, max_memory, needs, edited=has_state)
    assert room is not None
    if not (one := needs.get(EXPERT, 0)):
        return Memory(room, None, folder)
    assert solved is not None
    share = min(_statistics_of_expert(own, method, solved) / _bytes_of_expert(own, method, solved) for own in _experts(solved))
    return Memory(room // 2, int((one + room // 2) * share), folder)


STATISTICS, EXPERT, SOLVING, BATCH = "the statistics of a block", "those of an expert", "solving a linear", "a batch in a block"
HANDED = "what blocks hand on of a batch"
STATE = "what the state holds of a block"
STATE_COPIES = 2  # of a block's weights, beside that of a block that is changed: of other steps, or pruned ones


def _bytes_of_forward(model: nn.Module, course: Course | None, batches: Sequence[Batch]) -> int:
    """Return the bytes that the largest batch takes in a block."""
    most_rows = most_scores = 0
    for batch in _shapes_of(batches):
        samples, length = batch.shape
        rows = samples * length
        if course is not None:  # of images and sounds, only the observed forward tells how many rows they are
            slots = [slot for run in course.traces[batch.given].runs for slot in _slots_of(run.output) if len(slot.shape) == 3]
            rows = max([rows, *(math.prod(slot.shape[:-1]) * _growth(batch, batches) for slot in slots)])
        most_rows = max(most_rows, rows)
        most_scores = max(most_scores, score_bytes(model, samples, -(-rows // samples)))
    return forward_bytes(model, most_rows) + most_scores


def _shapes_of(batches: Sequence[Batch]) -> list[Batch]:
    """Return one batch of each kind and shape."""
    return list({(batch.given, batch.shape): batch for batch in batches}.values())


def _handed_on(course: Course, batch: Batch, batches: Sequence[Batch]) -> int:
    """Return the most bytes of a batch that blocks have returned and later ones, beyond the next, still use."""
    sizes = {
        Element(run.index, slot.place): math.prod(slot.shape) * slot.dtype.itemsize
        for run in course.traces[batch.given].runs
        for slot in _slots_of(run.output)
    }
    places = {index: place for place, index in enumerate(course.order)}
    spans = [(places[element.block], course.last_use(element), size) for element, size in sizes.items() if element.block in places]
    most = max((sum(size for made, used, size in spans if made <= place < used) for place in places.values()), default=0)
    return most * _growth(batch, batches)


def _growth(batch: Batch, batches: Sequence[Batch]) -> int:
    """Return how many times as large the values of a batch are at most as those of the sample of its kind that was observed."""
    observed = next(other for other in batches if other.given == batch.given)
    longer = max(1.0, batch.shape[1] / observed.shape[1])
    return math.ceil(batch.shape[0] * longer**2)


def _slots_of(output: object) -> list[Slot]:
    """Return the places of the tensors in what a block returned and set."""
    found: list[Slot] = []
    replaced(output, Slot, found.append)
    return found


def _needs(plan: Plan, method: Method, own_leaves: int, ranks: int) -> Needs:
    needs: type[Statistic] | None = getattr(method, "needs", None)
    gathers = plan.course is not None
    grams = gathers and (needs is None or plan.measure_error or plan.correction != NONE or inputs_of(needs) is Gram)
    found = {STATISTICS: 0, EXPERT: 0, SOLVING: 0}
    for part in plan.parts:
        plain = [linear for linear in part if not is_expert(linear)]
        solving = max([0, *(_solving(linear, method, plan) for linear in part)])
        if isinstance(method, BlockMethod):  # whose sums over tokens are added in a tree too
            sums = max([0, *(12 * math.prod(own.shape) + 4 * max(own.shape) ** 2 for own in plain)])
            solving += sums * (own_leaves.bit_length() - 1)
        found[SOLVING] = max(found[SOLVING], solving)
        if ranks > 1:  # when nothing is solved
            found[SOLVING] = max(found[SOLVING], 2 * min(MESSAGE, sum(linear.weight.nbytes for linear in part)))
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
