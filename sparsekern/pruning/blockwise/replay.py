"""Forwards whose blocks take more from earlier blocks than the last output, such as a decoder behind its encoder.

The forward of each batch waits in front of one block. To get there, the model is called with stand-ins: each block that is done
returns, and sets in the containers it is given, what it returned and set when it last ran, pruned. So the next block gets just the
arguments that a forward of the pruned model would give it. A tensor is kept only until the last block that uses it has its arguments,
and is on a shelf meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches import Batch
from ..values import Changes, replaced, set_entries, tensors_in, with_own_caches
from .course import Course
from .lineage import Element
from .shelf import Kept, Loaded, Shelf
from .stand_ins import SharedTensors, replaced_forwards
from .trace import Slot, Stop, forward, refused, slots, stopped


@dataclass
class Done:
    """The result of a block for one batch.

    Attributes:
        output: what it returned and set, with a `Slot` in place of each tensor.
        kept: the tensors that are still needed, by place.
    """

    output: Any
    kept: dict[int, Kept]


@dataclass
class Waiting:
    """The next block of a forward, and its arguments, whose tensors are on a shelf."""

    index: int
    args: tuple
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Output:
    """What a stand-in returns and sets.

    Attributes:
        values: with a `Slot` in place of each tensor.
        tensors: those that are known, by place.
    """

    values: Any
    tensors: dict[int, torch.Tensor]


@dataclass(frozen=True)
class _Returned:
    """What a block has just returned.

    Attributes:
        index: the block.
        tensors: all tensors that it returned and set.
        places: the place of each on the shelf; None where it has none yet.
    """

    index: int
    tensors: list[torch.Tensor]
    places: list[Kept | None]


class Replay:
    """The forwards of all batches. Each waits in front of one block."""

    def __init__(self, model: nn.Module, batches: list[Batch], course: Course, shelf: Shelf) -> None:
        """Check that every batch runs, and go to its first block. See `Activations` for the arguments.

        Raises:
            ValueError: the forward refuses a batch, or does not run the blocks as it was observed to.
        """
        self._model, self._batches, self._course = model, batches, course
        self._blocks = {index: course.blocks.modules[index] for index in course.order}
        self._places = {index: place for place, index in enumerate(course.order)}
        self._done: list[dict[int, Done]] = [{} for _ in batches]
        self._shelf, self._shared = shelf, SharedTensors(shelf)
        self._waiting: list[Waiting | None] = []
        for number in range(len(batches)):
            self._check(number)
            self._waiting.append(self._next(number))

    def run(self, batch: int, index: int) -> object:
        """Return the output of block `index` for a batch. Its arguments stay as they are."""
        _, output = self._run(batch, index, Loaded())
        return output

    def expect(self, batch: int) -> None:
        """Do nothing: the arguments of a batch are brought when it runs."""

    def waits(self, batch: int, index: int) -> bool:
        """Return whether the forward of a batch waits in front of block `index`."""
        waiting = self._waiting[batch]
        return waiting is not None and waiting.index == index

    def advance(self, batch: int, index: int) -> None:
        """Run block `index` for a batch, and replay its forward up to the next block."""
        loaded = Loaded()
        changes, output = self._run(batch, index, loaded)
        tensors: list[torch.Tensor] = []
        self._done[batch][index] = Done(slots((output, changes.found()), tensors), {})
        returned = _Returned(index, tensors, [loaded.place(tensor) for tensor in tensors])
        del loaded, output, changes
        self._waiting[batch] = None  # its arguments are not needed any more
        self._waiting[batch] = self._next(batch, returned)

    def finish(self, batch: int) -> None:
        """Call the model with stand-ins for all blocks."""
        loaded = Loaded()
        self._call(batch, lambda index, args, kwargs: self._output(index, self._done_by(batch, index, loaded), args, kwargs))

    def _run(self, batch: int, index: int, loaded: Loaded) -> tuple[Changes, object]:
        waiting = self._waiting[batch]
        assert waiting is not None and waiting.index == index
        # The containers are copied, since the block may set entries in them and is run more than once.
        args, kwargs = with_own_caches(replaced((waiting.args, waiting.kwargs), Kept, loaded.tensor))
        changes = Changes((args, kwargs))
        return changes, self._blocks[index](*args, **kwargs)

    def _next(self, batch: int, returned: _Returned | None = None) -> Waiting | None:
        """Replay the forward of a batch up to its next block, or return None where there is none.

        Args:
            batch: the number of the batch.
            returned: what the last block has just returned; None where none has run.
        """
        found: list[Waiting] = []
        done, loaded = self._done[batch], Loaded()

        def stand_in(index: int, args: tuple, kwargs: dict[str, Any]) -> object:
            if index in done:
                return self._output(index, self._done_by(batch, index, loaded, returned), args, kwargs)
            found.append(Waiting(index, args, kwargs))
            raise Stop

        self._call(batch, stand_in)
        next_place = self._places[found[0].index] if found else len(self._places)
        for index, result in done.items():
            result.kept = {slot: kept for slot, kept in result.kept.items() if self._is_used(index, slot, next_place)}
        known: dict[int, Kept] = {}  # by the id of a tensor
        if returned is not None:
            for slot, (tensor, place) in enumerate(zip(returned.tensors, returned.places, strict=True)):
                used = self._is_used(returned.index, slot, next_place)
                if used or place is not None:
                    known.setdefault(id(tensor), place or Kept(self._shelf, tensor))
                if used:
                    done[returned.index].kept[slot] = known[id(tensor)]
        if not found:
            return None
        first = next(iter(tensors_in((found[0].args, found[0].kwargs))), None)

        def place_of(tensor: torch.Tensor) -> Kept:
            place = known.get(id(tensor)) or loaded.place(tensor)
            if place is None:
                place = Kept(self._shelf, tensor) if tensor is first else self._shared.place(tensor)
            return known.setdefault(id(tensor), place)

        args, kwargs = replaced((found[0].args, found[0].kwargs), torch.Tensor, place_of)
        self._shared.next_batch()
        return Waiting(found[0].index, args, kwargs)

    def _is_used(self, index: int, slot: int, place: int) -> bool:
        """Return whether a tensor that block `index` returned is used behind the block of a place in the order."""
        return self._course.last_use(Element(index, slot)) > place

    def _done_by(self, batch: int, index: int, loaded: Loaded, returned: _Returned | None = None) -> _Output:
        """Return what a block that is done has returned and set, with the tensors that are still kept."""
        done = self._done[batch][index]
        if returned is not None and returned.index == index:
            return _Output(done.output, dict(enumerate(returned.tensors)))
        return _Output(done.output, {slot: loaded.tensor(kept) for slot, kept in done.kept.items()})

    def _output(self, index: int, made: _Output, args: tuple, kwargs: dict[str, Any]) -> object:
        """Return what a block has returned, and set the entries that it has set."""
        passed = tensors_in((args, kwargs))

        def tensor(slot: Slot) -> torch.Tensor:
            found = made.tensors.get(slot.place)
            if found is None:  # nothing uses its values
                alike = (t for t in passed if t.shape == slot.shape and t.dtype == slot.dtype)
                found = next(alike, None)
            if found is None:
                found = passed[0].new_zeros(slot.shape, dtype=slot.dtype) if passed else torch.zeros(slot.shape, dtype=slot.dtype)
            return found.clone() if self._course.is_overwritten(Element(index, slot.place)) else found

        output, entries = replaced(made.values, Slot, tensor)
        set_entries((args, kwargs), entries)
        return output

    def _check(self, number: int) -> None:
        """Run a batch with stand-ins for all blocks; raise unless the forward takes it and runs the blocks in their order.

        Raises:
            ValueError: the forward refuses the batch, or runs the blocks otherwise.
        """
        ran: list[int] = []

        def stand_in(index: int, args: tuple, kwargs: dict[str, Any]) -> object:
            ran.append(index)
            return self._output(index, _Output(self._course.run_of(index).output, {}), args, kwargs)

        try:
            self._call(number, stand_in)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the outputs of the stand-ins have the shapes of another batch
            ran = self._really_run(number)
        places = [self._places[index] for index in ran]
        if places != sorted(set(places)):
            raise ValueError(f"calibration: batch {number} runs the blocks in another order than earlier batches")

    def _really_run(self, number: int) -> list[int]:
        ran: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
            for index, block in self._blocks.items()
        ]
        try:
            forward(self._model, self._batches[number].inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise refused(self._model, self._batches[number], number, error) from error
        finally:
            for handle in handles:
                handle.remove()
        return ran

    def _call(self, batch: int, stand_in: Callable[[int, tuple, dict[str, Any]], object]) -> None:
        def standing_in(index: int) -> Callable[..., object]:
            return lambda *args, **kwargs: stand_in(index, args, kwargs)

        with replaced_forwards({block: standing_in(index) for index, block in self._blocks.items()}):
            stopped(lambda: forward(self._model, self._batches[batch].inputs))
