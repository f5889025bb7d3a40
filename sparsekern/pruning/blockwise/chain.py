"""The usual course of forwards: each block takes the output of the one before, and values that no block changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..batches import Batch
from ..values import replaced, with_own_caches
from .course import Course
from .shelf import Kept, Loaded, Shelf
from .stand_ins import SharedTensors, replaced_forwards
from .trace import HIDDEN, Stop, forward, refused, stopped


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block, except the hidden states. Its tensors may be on a shelf.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        hidden_name: the keyword of the hidden states; None where they come first.
    """

    args: tuple
    kwargs: dict[str, object]
    hidden_name: str | None

    @classmethod
    def split(cls, args: tuple, kwargs: dict) -> tuple[torch.Tensor, BlockCall]:
        """Return the hidden states of a call, and the rest of its arguments."""
        if args:
            return args[0], cls(args[1:], kwargs, None)
        rest = dict(kwargs)
        return rest.pop(HIDDEN), cls((), rest, HIDDEN)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of `block` for the hidden states `hidden` with these arguments."""
        args, kwargs = with_own_caches(replaced((self.args, self.kwargs), Kept, Loaded().tensor))
        if self.hidden_name is None:
            return _first(block(hidden, *args, **kwargs))
        return _first(block(**{self.hidden_name: hidden}, **kwargs))


class Chain:
    """The hidden states of every batch in front of the current block, and the arguments of all blocks."""

    def __init__(self, model: nn.Module, batches: list[Batch], course: Course, shelf: Shelf) -> None:
        """Call `model` once for each batch with blocks that return their input. See `Activations` for the arguments.

        Raises:
            ValueError: the forward refuses a batch, or does not run the blocks as it was observed to.
        """
        self._model, self._batches = model, batches
        self._blocks = {index: course.blocks.modules[index] for index in course.order}
        self._places = {index: place for place, index in enumerate(course.order)}
        self._returns_tuple = bool(course.order) and course.run_of(course.order[0]).returns_tuple
        self._shelf = shelf  # the hidden states, by the number of the batch
        self._calls: list[list[BlockCall]] = []
        shared = SharedTensors(shelf)
        for number, batch in enumerate(batches if course.order else ()):
            calls: list[BlockCall] = []
            ran: list[int] = []
            try:
                (hidden,), _ = self._run_around_blocks(batch, calls=calls, ran=ran)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise refused(model, batch, number, error) from error
            if tuple(ran) != course.order:
                raise ValueError(f"calibration: batch {number} runs other blocks than earlier batches with the same inputs")
            self._calls.append(
                [BlockCall(shared.replace(call.args), shared.replace(call.kwargs), call.hidden_name) for call in calls]
            )
            shared.next_batch()
            self._shelf.put(number, hidden)  # behind arguments, as those of the first batch may be those of all

    def hidden(self, batch: int) -> torch.Tensor:
        """Return the hidden states of a batch in front of the current block."""
        return self._shelf.get(batch)

    def shape(self, batch: int) -> torch.Size:
        """Return the shape of the hidden states of a batch, which are not read."""
        return self._shelf.shape(batch)

    def run(self, batch: int, index: int) -> torch.Tensor:
        """Return the output of block `index` for a batch."""
        return self.run_from(batch, index, self._shelf.get(batch))

    def expect(self, batch: int) -> None:
        """Begin to bring the hidden states of a batch to the GPU, if they are elsewhere: the batch runs next."""
        self._shelf.expect(batch)

    def run_from(self, batch: int, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of block `index` for the hidden states `hidden` of a batch."""
        return self._calls[batch][self._places[index]].run(self._blocks[index], hidden)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Replace the hidden states of a batch in front of the current block."""
        self._shelf.put(batch, hidden)

    def waits(self, batch: int, index: int) -> bool:
        """Return True: every batch runs every block."""
        return True

    def advance(self, batch: int, index: int) -> None:
        """Replace the hidden states of a batch by the output of block `index`."""
        self.put(batch, self.run(batch, index))

    def finish(self, batch: int, hidden: torch.Tensor | None = None) -> object:
        """Return what the model returns with a last block that returns `hidden`, or the batch's hidden states where that is None."""
        if self._blocks:
            return self._run_around_blocks(self._batches[batch], final=self._shelf.get(batch) if hidden is None else hidden)[1]
        return forward(self._model, self._batches[batch].inputs)

    def _run_around_blocks(
        self,
        batch: Batch,
        *,
        calls: list[BlockCall] | None = None,
        ran: list[int] | None = None,
        final: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], object]:
        """Call the model with blocks that return their input. The last one returns `final`, or ends the call if that is None.

        Returns:
            The input of the first block, if there is a block; and what the model returned, if it was not ended.
        """
        first: list[torch.Tensor] = []
        last = len(self._blocks) - 1

        def stand_in(index: int) -> Callable[..., torch.Tensor | tuple[torch.Tensor]]:
            def run(*args: object, **kwargs: object) -> torch.Tensor | tuple[torch.Tensor]:
                hidden, call = BlockCall.split(args, kwargs)
                if not first:
                    first.append(hidden)
                if calls is not None and ran is not None:
                    calls.append(call)
                    ran.append(index)
                if self._places[index] == last:
                    if final is None:
                        raise Stop
                    hidden = final
                return (hidden,) if self._returns_tuple else hidden

            return run

        with replaced_forwards({block: stand_in(index) for index, block in self._blocks.items()}):
            if final is None:
                stopped(lambda: forward(self._model, batch.inputs))
                return first, None
            return first, forward(self._model, batch.inputs)


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
