"""Running a model one block at a time: the arguments of each block, and the hidden states on their way through.

A probe of a few tokens first watches one real forward. It checks that the blocks run in order, each on the output of the one before,
and notes the order in which their linears are called. Then the model is called once for each batch with blocks that return their
input. This runs everything before and between the blocks, and records the arguments of each block (masks may differ between blocks).
From then on only single blocks run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...models import Blocks, Linear
from ..batches import Batch

PROBE_TOKENS = 8


class _Stop(Exception):
    """The end of a forward whose remaining work is not needed."""


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
        """Return the hidden states that `block` makes of `hidden` with these arguments."""
        if self.hidden_name is None:
            return _first(block(hidden, *self.args, **self.kwargs))
        return _first(block(**{self.hidden_name: hidden}, **self.kwargs))


OUTSIDE = ""  # where a probe files the calls of linears that are in no block


@dataclass
class Probe:
    """What a forward of a few tokens showed.

    Attributes:
        returns_tuple: whether a block returns a tuple.
        calls: by block name, the names of its linears in the order in which they are called.
    """

    returns_tuple: bool = False
    calls: dict[str, list[str]] = field(default_factory=lambda: {OUTSIDE: []})


def probe(model: nn.Module, blocks: Blocks, linears: Iterable[Linear], batch: Batch, *, to_the_end: bool) -> Probe:
    """Watch a real forward of the first tokens of `batch`, up to the end of the last block or of the model.

    Raises:
        ValueError: the blocks are not run in order, each once and on the output of the one before.
    """
    seen, place, hidden, versions = Probe(), OUTSIDE, None, []

    def before(index: int):
        def hook(module, args, kwargs):
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

    def after(index: int):
        def hook(module, args, output):
            nonlocal place, hidden
            if hidden._version != versions[index]:
                raise ValueError(f"model: {place} changes its input in place, which block-by-block pruning cannot follow")
            place, hidden, seen.returns_tuple = OUTSIDE, _first(output), isinstance(output, tuple)
            if index + 1 == len(blocks.modules) and not to_the_end:
                raise _Stop

        return hook

    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.callback(block.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after(index)).remove)
        for linear in linears:
            for module in linear.modules:
                hook = module.register_forward_pre_hook(lambda module, args, name=linear.name: seen.calls[place].append(name))
                stack.callback(hook.remove)
        _stopped(lambda: model(**batch.beginning(PROBE_TOKENS), use_cache=False))
    if len(versions) < len(blocks.modules):
        raise ValueError(f"model: a forward did not run {blocks.block_name(len(versions))}")
    return seen


class Activations:
    """The hidden states of every batch in front of the current block, and the arguments of all blocks."""

    def __init__(self, model: nn.Module, blocks: Blocks, batches: list[Batch], returns_tuple: bool) -> None:
        """Run everything of `model` but its blocks and what follows them, once for each batch."""
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

    def inputs_of(self, index: int, linears: list[Linear], order: list[str]) -> Iterator[tuple[Batch, dict[str, list]]]:
        """Yield, for each batch, the inputs of each of `linears` in block `index` with its current weights, by name.

        Args:
            order: their calls as the probe saw them. The forward ends where the last one would multiply.
        """
        block = self._blocks.modules[index]
        for batch, hidden, calls in zip(self.batches, self._hidden, self._calls, strict=True):
            yield batch, _record_inputs(linears, order, lambda h=hidden, c=calls: c[index].run(block, h))

    def inputs_outside(self, linears: list[Linear], order: list[str]) -> Iterator[tuple[Batch, dict[str, list]]]:
        """Yield the same for linears outside the blocks, once the hidden states have passed all blocks."""
        for batch, hidden in zip(self.batches, self._hidden, strict=True):
            yield batch, _record_inputs(linears, order, lambda b=batch, h=hidden: self._run_around_blocks(b, final=h))

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block `index`."""
        for i, (hidden, calls) in enumerate(zip(self._hidden, self._calls, strict=True)):
            self._hidden[i] = calls[index].run(self._blocks.modules[index], hidden)

    def _run_around_blocks(
        self, batch: Batch, *, calls: list[BlockCall] | None = None, final: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Call the model with blocks that return their input; the last one returns `final`, or ends the call where that is None."""
        first: list[torch.Tensor] = []
        last = self._blocks.modules[-1]

        def stand_in(block: nn.Module) -> Callable:
            def forward(*args, **kwargs):
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


def _record_inputs(linears: list[Linear], order: list[str], forward: Callable[[], object]) -> dict[str, list[torch.Tensor]]:
    """Return the tensors that each linear is called with during `forward`, which ends as soon as no linear can follow."""
    inputs: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in linears}
    versions: list[tuple[str, torch.Tensor, int]] = []
    # Only where the probe saw all linears called can it be known that none comes after the last (experts may sit out a few tokens).
    last = order[-1] if set(order) == set(inputs) else None

    def hook(name: str):
        def record(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            inputs[name].append(x)
            versions.append((name, x, x._version))
            if name == last and len(inputs[name]) == order.count(last):
                raise _Stop

        return record

    with ExitStack() as stack:
        for linear in linears:
            for module in linear.modules:
                stack.callback(module.register_forward_pre_hook(hook(linear.name), with_kwargs=True).remove)
        _stopped(forward)
    for name, x, version in versions:
        if x._version != version:
            raise ValueError(f"model: the input of {name} is overwritten after its use, which pruning cannot follow")
    return inputs


class _SharedTensors:
    """One copy of the arguments that are equal in all batches, such as rotary tables and masks."""

    def __init__(self) -> None:
        self._previous: list[torch.Tensor] = []
        self._current: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (the tensor itself, kept alive; its stand-in)

    def next_batch(self) -> None:
        self._previous = [kept for _, kept in self._current.values()]
        self._current = {}

    def replace_call(self, call: BlockCall) -> BlockCall:
        return BlockCall(self._replace(call.args), self._replace(call.kwargs), call.hidden_name)

    def _replace(self, value):
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
def _replaced_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
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


def _stopped(forward: Callable[[], object]) -> bool:
    try:
        forward()
    except _Stop:
        return True
    return False


def _first(output):
    return output[0] if isinstance(output, tuple) else output
