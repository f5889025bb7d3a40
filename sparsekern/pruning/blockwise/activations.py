"""A model run one block at a time: the arguments of each block, and the hidden states between the blocks.

A probe of a few tokens first watches one real forward. It checks that the blocks run in order, each on the output of the one before,
and records the order in which their linears are called. Then the model is called once for each batch with blocks that return their
input. This runs everything before and between the blocks, and records the arguments of each block (masks may differ between blocks).
From then on only single blocks run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ...models import Blocks, Linear
from ...models.experts import Experts, ExpertsCall, watched
from ..batches import Batch

PROBE_TOKENS = 8
Inputs = dict[str, list[torch.Tensor]]  # by linear, the tensors that it is called with
ExpertInputs = dict[str, list[ExpertsCall]]  # by fused experts, their calls


class _Stop(Exception):
    """Raised to end a forward whose remaining work is not needed."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block, except the hidden states.

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
        return rest.pop("hidden_states"), cls((), rest, "hidden_states")

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of `block` for the hidden states `hidden` with these arguments."""
        if self.hidden_name is None:
            return _first(block(hidden, *self.args, **self.kwargs))
        return _first(block(**{self.hidden_name: hidden}, **self.kwargs))


OUTSIDE = ""  # the key of linears that are in no block, in the calls of a probe


@dataclass
class Probe:
    """The observations of a forward of a few tokens.

    Attributes:
        returns_tuple: True if a block returns a tuple.
        calls: by block name, the names of its linears and fused experts in the order in which they are called.
    """

    returns_tuple: bool = False
    calls: dict[str, list[str]] = field(default_factory=lambda: {OUTSIDE: []})


def probe(
    model: nn.Module,
    blocks: Blocks,
    linears: Iterable[Linear],
    batch: Batch,
    *,
    experts: Iterable[Experts] = (),
    to_the_end: bool,
) -> Probe:
    """Watch a real forward of the first tokens of `batch`.

    Args:
        model: the model.
        blocks: its blocks.
        linears: the linears whose calls are recorded.
        batch: supplies the tokens.
        experts: the fused experts whose calls are recorded.
        to_the_end: run the whole model; otherwise stop after the last block.

    Raises:
        ValueError: the blocks are not run in order, each once and on the output of the one before.
    """
    seen, place = Probe(), OUTSIDE
    hidden: torch.Tensor | None = None
    versions: list[int] = []

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal place, hidden
            fed, _ = BlockCall.split(args, kwargs)
            if index != len(versions) or (hidden is not None and fed is not hidden):
                raise ValueError(
                    f"model: expected a forward to run {blocks.name} in order, each block on the output of the one before; "
                    f"{blocks.block_name(index)} was run otherwise"
                )
            place, hidden = blocks.block_name(index), fed
            seen.calls[place] = []
            versions.append(fed._version)

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            nonlocal place, hidden
            if hidden is not None and hidden._version != versions[index]:
                raise ValueError(f"model: {place} changes its input in place, which block-by-block pruning cannot follow")
            place, hidden, seen.returns_tuple = OUTSIDE, _first(output), isinstance(output, tuple)
            if index + 1 == len(blocks.modules) and not to_the_end:
                raise _Stop

        return hook

    def called(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            seen.calls[place].append(name)

        return hook

    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after(index)).remove)
        for linear in linears:
            for module in linear.modules:
                stack.callback(module.register_forward_pre_hook(called(linear.name)).remove)
        stack.enter_context(watched(experts, lambda found, _: seen.calls[place].append(found.name)))
        _stopped(lambda: model(**batch.beginning(PROBE_TOKENS), use_cache=False))
    if len(versions) < len(blocks.modules):
        raise ValueError(f"model: a forward did not run {blocks.block_name(len(versions))}")
    return seen


class Activations:
    """The hidden states of every batch in front of the current block, and the arguments of all blocks."""

    def __init__(self, model: nn.Module, blocks: Blocks, batches: list[Batch], returns_tuple: bool) -> None:
        """Run the part of `model` before and between its blocks, once for each batch.

        Args:
            model: the model.
            blocks: its blocks.
            batches: the calibration data.
            returns_tuple: True if a block returns a tuple, see `Probe`.
        """
        self.batches = batches
        self._model, self._blocks, self._returns_tuple = model, blocks, returns_tuple
        self._hidden: list[torch.Tensor] = []
        self._calls: list[list[BlockCall]] = []
        shared = _SharedTensors()
        for batch in batches:
            calls: list[BlockCall] = []
            self._hidden.append(self._run_around_blocks(batch, calls=calls))
            self._calls.append([shared.replace_call(call) for call in calls])
            shared.next_batch()

    def inputs_of(
        self, index: int, linears: Sequence[Linear], order: list[str], experts: Sequence[Experts] = ()
    ) -> Iterator[tuple[Batch, Inputs, ExpertInputs]]:
        """Yield each batch with the inputs of `linears` and `experts` in block `index`, for its current weights.

        Args:
            index: the block.
            linears: linears of the block.
            order: the names of `linears` and `experts` in the order of their calls. The forward ends at the input of the last one.
            experts: fused experts of the block.
        """
        block = self._blocks.modules[index]
        for batch, hidden, calls in zip(self.batches, self._hidden, self._calls, strict=True):
            yield batch, *_record_inputs(linears, experts, order, partial(calls[index].run, block, hidden))

    def inputs_outside(
        self, linears: Sequence[Linear], order: list[str], experts: Sequence[Experts] = ()
    ) -> Iterator[tuple[Batch, Inputs, ExpertInputs]]:
        """Yield each batch with the inputs of linears and experts outside the blocks, once all blocks have run."""
        for batch, hidden in zip(self.batches, self._hidden, strict=True):
            yield batch, *_record_inputs(linears, experts, order, partial(self._run_around_blocks, batch, final=hidden))

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block `index`."""
        for i, (hidden, calls) in enumerate(zip(self._hidden, self._calls, strict=True)):
            self._hidden[i] = calls[index].run(self._blocks.modules[index], hidden)

    def _run_around_blocks(
        self, batch: Batch, *, calls: list[BlockCall] | None = None, final: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Call the model with blocks that return their input. The last one returns `final`, or ends the call if that is None."""
        first: list[torch.Tensor] = []
        last = self._blocks.modules[-1]

        def stand_in(block: nn.Module) -> Callable[..., torch.Tensor | tuple[torch.Tensor]]:
            def forward(*args: object, **kwargs: object) -> torch.Tensor | tuple[torch.Tensor]:
                hidden, call = BlockCall.split(args, kwargs)
                first.append(hidden)
                if calls is not None:
                    calls.append(call)
                if block is last:
                    if final is None:
                        raise _Stop
                    hidden = final
                return (hidden,) if self._returns_tuple else hidden

            return forward

        with _replaced_forwards({block: stand_in(block) for block in self._blocks.modules}):
            if final is None:
                _stopped(lambda: self._model(**batch.inputs, use_cache=False))
            else:
                self._model(**batch.inputs, use_cache=False)
        return first[0]


def _record_inputs(
    linears: Sequence[Linear], experts: Sequence[Experts], order: list[str], forward: Callable[[], object]
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
            raise _Stop

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["input"]
            inputs[name].append(x)
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
        _stopped(forward)
    for name, x, version in versions:
        if x._version != version:
            raise ValueError(f"model: the input of {name} is overwritten after its use, which pruning cannot follow")
    return inputs, calls


class _SharedTensors:
    """A cache that keeps one copy of arguments that are equal in successive batches, such as rotary tables and masks."""

    def __init__(self) -> None:
        self._previous: list[torch.Tensor] = []
        self._current: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (the tensor itself, kept alive; its stand-in)

    def next_batch(self) -> None:
        """Begin a new batch, whose tensors are compared with those of the one before."""
        self._previous = [kept for _, kept in self._current.values()]
        self._current = {}

    def replace_call(self, call: BlockCall) -> BlockCall:
        """Return the call with each tensor replaced by an equal one of the batch before."""
        return BlockCall(self._replace(call.args), self._replace(call.kwargs), call.hidden_name)

    def _replace(self, value: Any) -> Any:
        """Return an argument of any type with its tensors replaced, inside tuples, lists and dictionaries too."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._current:
                same = (t for t in self._previous if t.dtype == value.dtype and torch.equal(t, value))
                self._current[id(value)] = (value, next(same, value))
            return self._current[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        if type(value) is dict:
            return {key: self._replace(v) for key, v in value.items()}
        return value


@contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Call these functions in place of the modules' own `forward` within."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _stopped(forward: Callable[[], object]) -> None:
    """Call `forward`, which may end with `_Stop`."""
    with suppress(_Stop):
        forward()


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
