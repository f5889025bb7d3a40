"""One block solved stage by stage: each linear sees the inputs that make what is pruned so far, also within the block.

The linears with the same input are one stage. With the dense model's forwards at hand, the target of each linear is what the dense
model computes there, see `methods.correction`. The experts of a mixture are left to the caller.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import nn

from ...methods import Gram
from ...methods.correction import Correction, Drift
from ...models import Linear
from ..batches import Batch
from ..run import RunContext
from .activations import Activations, Inputs
from .course import Course
from .dense_stream import DenseStream
from .residual import residual_readers, stream_read
from .shares import LeafSums, Share
from .sharing import solve_shared
from .solving import Job, Solved, Solver
from .statistics import add_input, identity
from .targets import StageSums, dealt_targets


def stages_of(course: Course, index: int, linears: Sequence[Linear]) -> list[list[Linear]]:
    """Return the linears of block `index` in the order of their calls, those with the same input together."""
    place = {name: number for number, name in reversed(list(enumerate(course.calls(index))))}
    stages: dict[Hashable, list[Linear]] = {}
    for linear in sorted(linears, key=lambda linear: place.get(linear.name, len(place))):
        inputs = tuple(trace.inputs.get(linear.name, linear.name) for trace in course.traces.values())
        stages.setdefault(inputs, []).append(linear)
    return list(stages.values())


class SequentialBlock:
    """The linears of one block, solved in stages. The model has the new weights of those that are done."""

    def __init__(
        self,
        index: int,
        context: RunContext,
        solver: Solver,
        share: Share,
        activations: Activations,
        course: Course,
        dense: DenseStream | None,
    ) -> None:
        """Prepare block `index`.

        Args:
            index: the block, or the number of blocks for the linears outside them.
            context: the run.
            solver: solves a linear.
            share: the batches of this rank.
            activations: the inputs of the block in the pruned model.
            course: the course of the forwards.
            dense: the inputs of the block in the dense model; None prunes to the dense weights.
        """
        self._index, self._context, self._solver, self._share = index, context, solver, share
        self._activations, self._course, self._dense = activations, course, dense

    def solve(self, linears: Sequence[Linear], result: Solved) -> None:
        """Solve linears. Each is written to the model once its stage is solved.

        Raises:
            ValueError: NaN or Inf in an input; linears of a stage whose inputs differ in some batch.
        """
        world, leaves = self._context.world, self._context.leaves
        readers = self._readers(linears) if self._dense is not None else {}
        for stage in stages_of(self._course, self._index, linears):
            outputs = {name: module for name, module in readers.items() if len(stage) == 1 and name == stage[0].name}
            sums = self._gather(stage, outputs)
            whole = sums.fitted if self._dense is None else sums.fitted.plus(sums.held_out)
            if not whole.gram.tokens:
                self._solver.solve_unseen(stage, result)
                continue
            self._solver.check_statistic(stage, whole.gram)
            corrections: list[Correction | None] = [None] * len(stage)
            gram = whole.gram
            if self._dense is not None:
                with self._context.clock.phase("correct"):
                    corrections = list(dealt_targets(world, [linear.weight for linear in stage], sums, whole))
                gram = gram.clone()  # without the factor of a correction, which not all ranks have
            del sums, whole
            jobs = [Job(linear, self._needed(gram), gram, target) for linear, target in zip(stage, corrections, strict=True)]
            solve_shared(self._solver, world, leaves, jobs, result)
            for linear in stage:
                linear.weight.copy_(result.weights[linear.name])

    def _needed(self, gram: Gram) -> Gram | None:
        return None if self._solver.method.needs is None else gram

    def _readers(self, linears: Sequence[Linear]) -> dict[str, nn.Module]:
        """Return what reads the residual stream in front of those linears that write to it."""
        blocks = self._course.blocks.modules
        if self._index >= len(blocks):
            return {}
        block, own = blocks[self._index], self._activations
        first = next((number for number in range(len(own.batches)) if own.runs(number, self._index)), None)
        found: dict[str, str] | None = None
        with self._context.clock.phase("forward"):
            if first is not None:
                names = {module: name for name, module in block.named_modules()}
                readers = residual_readers(block, linears, lambda: own.run(first, self._index))
                found = {linear: names[module] for linear, module in readers.items()}
        told = self._context.world.gather("readers", found)
        of_first: dict[str, str] = next((own for own in told if own is not None), {})
        return {linear: block.get_submodule(name) for linear, name in of_first.items()}

    def _gather(self, stage: Sequence[Linear], readers: dict[str, nn.Module]) -> StageSums:
        """Return the sums over the batches of all ranks."""
        has_dense = self._dense is not None
        summed = LeafSums(lambda: StageSums.of(stage[0], has_dense=has_dense, writes_residual=bool(readers)), self._share)
        steps = self._steps(stage, readers)
        clock, world = self._context.clock, self._context.world
        while True:
            world.check()
            with clock.phase("forward"):
                step = next(steps, None)
            if step is None:
                break
            with clock.phase("statistics"):
                batch, pruned, dense, lacks = step
                sums = summed.of(batch)
                self._add(sums.held_out if batch.held_out else sums.fitted, stage, batch, pruned, dense, lacks)
        with clock.phase("exchange" if world.size > 1 else "statistics"):
            return summed.result()

    def _steps(
        self, stage: Sequence[Linear], readers: dict[str, nn.Module]
    ) -> Iterator[tuple[Batch, Inputs, Inputs | None, dict[str, torch.Tensor]]]:
        """Yield each batch with the inputs of a stage in both models, and with what the residual stream lacks of the dense one."""
        names = {linear.name for linear in stage}
        order = [name for name in self._course.calls(self._index) if name in names]
        inside = self._index < len(self._course.blocks.modules)
        if inside:
            pruned = self._activations.inputs_of(self._index, stage, order)
        else:
            pruned = self._activations.inputs_outside(stage, order)
        dense = None
        if self._dense is not None:
            dense = self._dense.inputs_of(self._index, stage, order) if inside else self._dense.inputs_outside(stage, order)
        while True:
            with stream_read(readers) as own:
                step = next(pruned, None)
            if step is None:
                return
            batch, inputs, _ = step
            if dense is None:
                yield batch, inputs, None, {}
                continue
            with stream_read(readers) as other:
                wanted = next(dense)
            yield batch, inputs, wanted, {name: other[name] - own[name] for name in readers}

    def _add(
        self,
        sums: Drift,
        stage: Sequence[Linear],
        batch: Batch,
        pruned: Inputs,
        dense: Inputs | None,
        lacks: dict[str, torch.Tensor],
    ) -> None:
        name = stage[0].name
        for linear in stage[1:]:
            if list(map(identity, pruned[linear.name])) != list(map(identity, pruned[name])):
                raise ValueError(
                    f"{linear.name}: has other inputs than {name} in some batches, so the block is not solved in stages"
                )
        masks = self._course.masks(name, self._index)
        for call, x in enumerate(pruned[name]):
            mask = masks[min(call, len(masks) - 1)]
            add_input(sums.gram, name, x, batch, mask)
            if dense is None:
                continue
            rows, row_mask = batch.flatten(x, mask)
            lack = lacks[name].reshape(len(rows), -1) if name in lacks and call == 0 else None
            try:
                sums.add_drift(rows, dense[name][call].reshape(rows.shape), row_mask, lack)
            except ValueError as error:
                raise ValueError(f"{name}: in the dense model: {error}") from error
