"""The inputs of each block of a model, batch by batch, while the blocks in front of it are pruned one after another.

The model is called once for each batch with stand-ins for its blocks. This runs everything before and between the blocks, and records
the arguments of the blocks (masks may differ between them). From then on only single blocks run. Where a block takes more from the
blocks before it than their last output, the calls are replayed from block to block, see `Replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import nn

from ...models import Linear
from ...models.experts import Experts, ExpertsCall, watched
from ..batches import Batch
from .chain import Chain
from .course import Course
from .replay import Replay
from .routed_rows import followed, unknown_tokens
from .shelf import Shelf
from .trace import Stop, stopped

Inputs = dict[str, list[torch.Tensor]]  # by linear, the tensors that it is called with
Routed = Mapping[str, tuple[nn.Module, str | None]]  # by linear of an expert, the module that calls it and the padding mask there
ExpertInputs = dict[str, list[ExpertsCall]]  # by fused experts, their calls


class Forwards(Protocol):
    """The forwards of all batches, each of which waits in front of one block."""

    def run(self, batch: int, index: int) -> object:
        """Run block `index` for a batch."""

    def expect(self, batch: int) -> None:
        """Begin to bring what a batch needs to the GPU, as it runs next."""

    def waits(self, batch: int, index: int) -> bool:
        """Return whether the forward of a batch waits in front of block `index`."""

    def advance(self, batch: int, index: int) -> None:
        """Run block `index`, and go on to the next one."""

    def finish(self, batch: int) -> object:
        """Run all that is outside the blocks, once the forward has passed all blocks."""


class Activations:
    """The arguments of the current block for every batch.

    Attributes:
        batches: the calibration data.
        shelf: holds the hidden states, the tensors of other arguments, and what else is kept for every batch.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], course: Course, shelf: Shelf | None = None) -> None:
        """Run the part of `model` around its blocks, once for each batch.

        Args:
            model: the model.
            batches: the calibration data.
            course: what was observed of the model's forwards.
            shelf: holds the tensors that blocks are called with; None keeps them in memory.

        Raises:
            ValueError: the forward refuses a batch, or does not run the blocks as it was observed to.
        """
        self.batches, self.shelf = batches, shelf or Shelf()
        self._forwards: Forwards = (Chain if course.chain else Replay)(model, batches, course, self.shelf)

    def inputs_of(
        self, index: int, linears: Sequence[Linear], order: list[str], experts: Sequence[Experts] = (), routed: Routed | None = None
    ) -> Iterator[tuple[Batch, Inputs, ExpertInputs]]:
        """Yield each batch that runs block `index`, with the inputs of `linears` and `experts` in it, for its current weights.

        Args:
            index: the block.
            linears: linears of the block.
            order: the names of `linears` and `experts` in the order of their calls. The forward ends at the input of the last one.
            experts: fused experts of the block.
            routed: the linears of experts that are modules of their own. Their inputs are without padding.
        """
        for number, batch in enumerate(self.batches):
            if self._forwards.waits(number, index):
                self._expect(number)
                inputs = _RoutedInputs(batch, routed or {})
                yield batch, *_record_inputs(linears, experts, order, partial(self._forwards.run, number, index), inputs)

    def inputs_outside(
        self, linears: Sequence[Linear], order: list[str], experts: Sequence[Experts] = ()
    ) -> Iterator[tuple[Batch, Inputs, ExpertInputs]]:
        """Yield each batch with the inputs of linears and experts outside the blocks, once all blocks have run."""
        for number, batch in enumerate(self.batches):
            yield batch, *_record_inputs(linears, experts, order, partial(self._forwards.finish, number))

    @property
    def is_chain(self) -> bool:
        """True if each block takes the output of the one before, which `hidden` returns."""
        return isinstance(self._forwards, Chain)

    def hidden(self, number: int) -> torch.Tensor:
        """Return the hidden states of batch `number` in front of the current block of a chain."""
        return self.chain.hidden(number)

    @property
    def chain(self) -> Chain:
        """The forwards of a model whose blocks take the output of the one before each."""
        assert isinstance(self._forwards, Chain)
        return self._forwards

    def runs(self, number: int, index: int) -> bool:
        """Return whether batch `number` runs block `index` next."""
        return self._forwards.waits(number, index)

    def run(self, number: int, index: int) -> object:
        """Return the output of block `index` for batch `number`, with its current weights."""
        return self._forwards.run(number, index)

    def advance(self, index: int, check: Callable[[], None] = lambda: None) -> None:
        """Run block `index` for the batches that run it, and go on to the next block. `check` is called in front of each batch."""
        for number in range(len(self.batches)):
            check()
            if self._forwards.waits(number, index):
                self._expect(number)
                self._forwards.advance(number, index)

    def _expect(self, number: int) -> None:
        """Bring batch `number`, and the one behind it while that one runs. Behind the last is the first, of the next pass."""
        self._forwards.expect(number)
        if (following := (number + 1) % len(self.batches)) != number:
            self._forwards.expect(following)


class _RoutedInputs:
    """The inputs of experts that are modules of their own, without padding."""

    def __init__(self, batch: Batch, routed: Routed) -> None:
        """Prepare for one batch. See `Activations.inputs_of` for the arguments."""
        self._batch = batch
        self._masks = {name: found for name, (_, mask) in routed.items() if (found := batch.mask(mask)) is not None}
        self._owners = [routed[name][0] for name in self._masks]
        self._tokens: Callable[[torch.Tensor], torch.Tensor | None] = lambda x: None
        self._found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (the tensor itself, kept alive; its real rows)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the rows of the batch within, if it has padding."""
        if not self._masks:
            yield
            return
        with followed(self._owners, next(iter(self._masks.values())).numel()) as self._tokens:
            yield

    def real(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of the input of a linear that are not padding, as the same tensor for the same input.

        Raises:
            ValueError: the linear is an expert's, and the tokens of its rows are not known.
        """
        if name not in self._masks:
            return x
        if id(x) not in self._found:
            tokens = self._tokens(x)
            if tokens is None:
                raise ValueError(f"{name}: {unknown_tokens()}")
            self._found[id(x)] = x, x.reshape(-1, x.shape[-1])[self._masks[name].flatten()[tokens]]
        return self._found[id(x)][1]


def _record_inputs(
    linears: Sequence[Linear],
    experts: Sequence[Experts],
    order: list[str],
    forward: Callable[[], object],
    routed: _RoutedInputs | None = None,
) -> tuple[Inputs, ExpertInputs]:
    """Return the inputs of the linears and fused experts during `forward`, which ends as soon as none of them can follow."""
    inputs: Inputs = {linear.name: [] for linear in linears}
    calls: ExpertInputs = {found.name: [] for found in experts}
    versions: list[tuple[str, torch.Tensor, int]] = []
    # The last one is known only if the probe saw calls of all: experts with linears of their own may not be called for a few tokens.
    last = order[-1] if set(order) == inputs.keys() | calls.keys() else None

    def read(name: str, x: torch.Tensor, seen: int) -> None:
        versions.append((name, x, x._version))
        if name == last and seen == order.count(last):
            raise Stop

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["input"]
            inputs[name].append(x if routed is None else routed.real(name, x))
            read(name, x, len(inputs[name]))

        return record

    def visit(found: Experts, call: ExpertsCall) -> None:
        calls[found.name].append(call)
        read(found.name, call.hidden, len(calls[found.name]))

    with ExitStack() as stack:
        for linear in linears:
            for module in linear.modules:
                stack.callback(module.register_forward_pre_hook(hook(linear.name), with_kwargs=True).remove)
        stack.enter_context(watched(experts, visit))
        stack.enter_context(nullcontext() if routed is None else routed.watched())
        stopped(forward)
    for name, x, version in versions:
        if x._version != version:
            raise ValueError(f"model: the input of {name} is overwritten after its use, which pruning cannot follow")
    return inputs, calls
