"""The memory of a streamed run: what it needs in any case, and what hidden states and the statistics of experts may take beside that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..methods import BlockMethod, FourBits, LinearMethod, Method
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
from .corrections import DENSE, NONE
from .experts.plan import ExpertPlan
from .plan import Plan
from .values import replaced

DRIFTS = 4  # square matrices of the sums of a corrected stage: two Gram matrices and two products with what the inputs lack
CORRECTING = 6  # more of them while targets are made: those of all tokens, one to judge on, a factor and copies
STEPS = 52  # bytes a weight of a linear whose target is made: two steps, what they are solved from, products in float64
TRAINED = 24  # bytes a weight of a block that is tuned: gradient, two moments, mask, the best weights and those from before
MASTERS = 8  # more of them for weights of 16 or 4 bits: one in float32, and roundings of it
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

    def shelf(self, model: nn.Module, streams: int = 1) -> Shelf:
        """Return an empty shelf for the hidden states of a model, one of `streams` that share the limit."""
        carrier = None if self.hidden is None else carrier_for(next(model.parameters()).device)
        return Shelf(None if self.hidden is None else self.hidden // streams, self.folder, carrier)


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
    if solved is not None and solved.needs_dense_stream:
        needs[BATCH] *= 2 if solved.tune is None else 3  # inputs in both models, or those of a backward pass and their gradients
        needs[HANDED] = 2 * needs.get(HANDED, 0)
        needs |= _needs_of_dense_stream(solved, own_leaves, on_grid=isinstance(method, FourBits))
    room = room_beside(model, max_memory, needs, edited=has_state)
    assert room is not None
    if not (one := needs.get(EXPERT, 0)):
        return Memory(room, None, folder)
    assert solved is not None
    share = min(_statistics_of_expert(own, method, solved) / _bytes_of_expert(own, method, solved) for own in _experts(solved))
    return Memory(room // 2, int((one + room // 2) * share), folder)


STATISTICS, EXPERT, SOLVING, BATCH = "the statistics of a block", "those of an expert", "solving a linear", "a batch in a block"
HANDED = "what blocks hand on of a batch"
DENSE_WEIGHTS, TUNING = "the dense weights of a block", "tuning a block"
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


def _needs_of_dense_stream(plan: Plan, own_leaves: int, *, on_grid: bool) -> Needs:
    """Return the bytes of what is kept of a block while it is pruned, and of its training."""
    weights = max(sum(linear.weight.nbytes for linear in part) for part in plan.parts)
    found = {DENSE_WEIGHTS: 2 * weights}  # kept, and those that a dense run takes the place of
    if plan.tune is not None:
        blocks = zip(plan.blocks.modules, plan.block_linears, strict=True)
        found[TUNING] = max(_training(block, linears, own_leaves, on_grid=on_grid) for block, linears in blocks)
    return found


def _training(block: nn.Module, linears: Sequence[Linear], own_leaves: int, *, on_grid: bool) -> int:
    """Return the bytes that tuning a block takes beside its weights and activations."""
    partial = 0 if own_leaves == 1 else 4 * (own_leaves.bit_length() + 1)  # gradients of some leaves, and a message
    pruned = {linear.parameter for linear in linears}
    trained = [parameter for parameter in block.parameters() if parameter in pruned or parameter.dim() < 2]
    return sum(own.numel() * (TRAINED + partial + MASTERS * ((own.element_size() < 4) + on_grid)) for own in trained)


def _solving(linear: Linear, method: Method, plan: Plan) -> int:
    """Return the bytes that solving a linear and measuring its error take at most, and before that making its target."""
    assert isinstance(method, LinearMethod)
    rows, features = linear.shape
    correcting = STEPS * rows * features if plan.correction == DENSE else 0
    return max(method.solving_bytes(rows, features), ENERGY * features**2 if plan.measure_error else 0, correcting)


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
    if plan.correction != NONE:
        return _sums_of_stage(plan, linears, parts)
    inputs = {(plan.course.input_of(linear.name), linear.features) for linear in linears}
    total = sum(4 * features**2 * max(2, parts) if grams else 4 * features * parts for _, features in inputs)
    if needs is not None and issubclass(needs, Importance):
        total += sum(4 * linear.weight.numel() * parts for linear in linears)
    return total


def _sums_of_stage(plan: Plan, linears: Sequence[Linear], parts: int) -> int:
    """Return the bytes of the sums of those linears with the same inputs that take most, with partial sums and a factor."""
    assert plan.course is not None
    stages: dict[object, list[Linear]] = {}
    for linear in linears:
        stages.setdefault(plan.course.input_of(linear.name), []).append(linear)
    found = [0]
    for stage in stages.values():
        features = stage[0].features
        if plan.correction == DENSE:
            outputs = sum(linear.shape[0] for linear in stage)
            residual = stage[0].shape[0] if len(stage) == 1 else 0
            squares, rest = parts * DRIFTS + CORRECTING, outputs + residual * (2 * parts + 1)
        else:
            squares, rest = parts * DRIFTS + 1, 0
        found.append(4 * features * (squares * features + rest))
    return max(found)
