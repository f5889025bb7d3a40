"""The forwards of the dense model, in step with those of the model that is pruned block by block.

Both wait in front of the same block. The dense weights of that block are kept while it is pruned, and lent to it for each dense run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ...models import Linear
from ...models.streaming import in_memory, stream_of
from ..batches import Batch
from ..run import Blocks
from .activations import Activations, Inputs
from .course import Course
from .shelf import Shelf
from .written import written_meanwhile


class DenseStream:
    """The arguments of the current block in the dense model, for every batch.

    For each block, `keep` comes before its weights change, and `advance` after its last use here.

    Attributes:
        activations: the forwards of the dense model. Its runs take the weights that the block has, see `dense_weights`.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], course: Course, shelf: Shelf | None = None) -> None:
        """Run the part of the dense `model` around its blocks, once for each batch. See `Activations` for the arguments."""
        self._model = model
        self.activations = Activations(model, batches, course, shelf)
        self._dense: list[tuple[Linear, torch.Tensor]] = []
        self._passed: int | None = None

    def keep(self, linears: Sequence[Linear]) -> None:
        """Remember the weights of the current block's linears, which are about to be pruned."""
        self._dense = [(linear, linear.weight.clone()) for linear in linears]

    def dense(self, linear: Linear) -> torch.Tensor:
        """Return the dense weight of a linear of the current block."""
        return next(weight for own, weight in self._dense if own is linear)

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """Give the current block its dense weights within."""
        changed = [(linear, weight) for linear, weight in self._dense if not torch.equal(linear.weight, weight)]
        with written_meanwhile([linear for linear, _ in changed], {linear.name: weight for linear, weight in changed}):
            yield

    def inputs_of(self, index: int, linears: Sequence[Linear], order: list[str]) -> Iterator[Inputs]:
        """Yield the inputs of linears of block `index` in the dense model, for each batch that runs it.

        See `Activations.inputs_of` for the arguments.
        """
        steps = self.activations.inputs_of(index, linears, order)
        while True:
            with self.dense_weights():
                step = next(steps, None)
            if step is None:
                return
            yield step[1]

    def inputs_outside(self, linears: Sequence[Linear], order: list[str]) -> Iterator[Inputs]:
        """Yield the inputs of linears outside the blocks in the dense model, once all blocks have run."""
        for _, inputs, _ in self.activations.inputs_outside(linears, order):
            yield inputs

    def advance(self, index: int, check: Callable[[], None] = lambda: None) -> None:
        """Run the dense block `index` and go on to the next block. It is done once, however often it is asked for.

        Afterwards `activations.hidden` returns the dense outputs of the block. `check` is called in front of each batch.
        """
        if self._passed == index:
            return
        with self.dense_weights():
            self.activations.advance(index, check)
        self._passed = index

    def advance_finished(self, index: int, finished: Blocks, check: Callable[[], None] = lambda: None) -> None:
        """Do what `advance` does for a block that an earlier run has finished, if the model is streamed.

        The block is read as it was in front of that run, and released. A block of a model in memory is still dense, so that `keep` and
        `advance` do. See `advance` for `check`.
        """
        stream = stream_of(self._model)
        if stream is None or index >= len(stream.blocks):
            return
        with finished.as_before(index), in_memory(self._model, index):
            self.keep(())
            self.advance(index, check)
