"""What a forward does with the blocks: a whole sample runs once before any work, and is watched.

The trace tells in which order the blocks run, in which order each calls its linears, which values of earlier blocks each reads, and
which padding mask the inputs of each linear follow. A model that cannot be pruned block by block is refused here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...models import Blocks, Linear
from ...models.expert_checks import verified
from ...models.experts import watched
from ...models.linears import is_plain_linear, multiplies
from ...models.stored_reading import SourceError
from ...models.streaming import in_memory
from ...models.unsupported import CannotFollow
from ..batches import BY_POSITION, DECODED, FITTING, SEQUENCES, TOKENS, Batch, fitted, unclear
from ..process import PutBack
from ..values import Changes, replaced, tensors_in
from .experts import experts_in, parted
from .lineage import ARGUMENT, Element, Lineage, Origin
from .routed_rows import followed, owners_of, unknown_tokens

OUTSIDE = ""  # the key of linears that are in no block, in the calls of a trace
END = 1 << 30  # the reader of values that linears outside the blocks are called with
HIDDEN = "hidden_states"  # the keyword of the hidden states of a block that takes no positional arguments
DECODER_INPUTS = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})


MAIN_INPUTS = frozenset({"input_ids", "inputs_embeds", "input_features", "input_values"})


class Stop(Exception):
    """Raised to end a forward whose remaining work is not needed."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a block's output."""

    place: int
    shape: torch.Size
    dtype: torch.dtype


def slots(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return `value` with a `Slot` for each of its tensors, which are appended to `tensors`."""

    def slot(tensor: torch.Tensor) -> Slot:
        tensors.append(tensor)
        return Slot(len(tensors) - 1, tensor.shape, tensor.dtype)

    return replaced(value, torch.Tensor, slot)


@dataclass
class Run:
    """One run of a block.

    Attributes:
        index: the block.
        chained: True if its hidden states are the unchanged output of the run before.
        output: all that it returned and set, with a `Slot` for each tensor.
        elements: the values of earlier blocks among its arguments.
        mask: the padding mask that its hidden states follow, as in `Trace.masks`.
        plain: True if it returned one tensor, or a tuple of one, and set nothing.
        returns_tuple: True if it returned a tuple.
        has_hidden: True if its hidden states come first among its arguments, or by the keyword `HIDDEN`.
    """

    index: int
    chained: bool
    elements: frozenset[Element]
    mask: str | None
    output: Any = None
    plain: bool = True
    returns_tuple: bool = False
    has_hidden: bool = True


@dataclass
class Trace:
    """The observations of one forward.

    Attributes:
        runs: the runs of blocks, in order.
        calls: by block name, the names of its linears and fused experts in the order in which they are called.
        masks: for each linear and each module of fused experts, the padding masks that the inputs of its calls follow, one after
            another; None where no padding is known. `BY_POSITION` follows where the rows are sorted by position.
        inputs: for each linear, what tells its first input from other tensors.
        unclear: for each linear whose inputs do not tell which of their rows would be padding, why.
        read: the linears whose weights are read although they are not called.
        otherwise: the linears that return something else than the product of their input and their weight.
        users: for each element, the blocks that read it.
        hidden: pairs of blocks of which the second reads a tensor of the first that it was not given.
        overwritten: elements that the model changes in place between the blocks; that of place `ARGUMENT` where a block changes its
            arguments.
        outside: the elements that the inputs of linears outside the blocks are made from.
    """

    runs: list[Run] = field(default_factory=list)
    calls: dict[str, list[str]] = field(default_factory=lambda: {OUTSIDE: []})
    masks: dict[str, list[str | None]] = field(default_factory=dict)
    inputs: dict[str, Hashable] = field(default_factory=dict)
    unclear: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    otherwise: set[str] = field(default_factory=set)
    users: dict[Element, set[int]] = field(default_factory=dict)
    hidden: list[tuple[int, int]] = field(default_factory=list)
    overwritten: set[Element] = field(default_factory=set)
    outside: frozenset[Element] = frozenset()

    @property
    def order(self) -> list[int]:
        """The blocks in the order of their runs."""
        return [run.index for run in self.runs]

    def run_of(self, index: int) -> Run:
        """Return the run of block `index`."""
        return next(run for run in self.runs if run.index == index)


def stopped(function: Callable[[], object]) -> None:
    """Call `function`, which may end with `Stop`."""
    with suppress(Stop):
        function()


def forward(model: nn.Module, inputs: dict[str, Any]) -> object:
    """Call `model` without caches of keys and values."""
    return model(**{**inputs, **_uncached(model)})


def refused(model: nn.Module, batch: Batch, number: int, error: Exception) -> ValueError:
    """Return the error for a batch that the model's forward refuses, or that of the files that a streamed model is read from."""
    if isinstance(error, SourceError):
        return SourceError(str(error))
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    hint = "; an encoder-decoder may need decoder_input_ids or labels" if decodes and not batch.given & DECODER_INPUTS else ""
    name = type(model).__name__
    return ValueError(f"calibration: the forward of {name} refuses batch {number}: {type(error).__name__}: {error}{hint}")


def observe(
    model: nn.Module, blocks: Blocks, linears: Iterable[Linear], batch: Batch, number: int, *, to_the_end: bool = False
) -> Trace:
    """Watch a real forward of the first sample of `batch`, or of all of it where it cannot be divided.

    Args:
        model: the model.
        blocks: its blocks.
        linears: the linears whose calls are recorded.
        batch: supplies the sample.
        number: the number of the batch, for the error.
        to_the_end: run the model's head too, whose outputs take memory.

    Raises:
        ValueError: the forward refuses the batch, or does what cannot be followed.
    """
    linears = list(linears)
    alone = batch.first_sample_alone()
    try:
        if alone is not None and batch.shape[0] > 1:
            # Images of all samples may be stored one after another, by chance as many as there are samples.
            with suppress(Exception):
                return _Observer(model, blocks, linears, alone, to_the_end).trace
        return _Observer(model, blocks, linears, batch.inputs, to_the_end).trace
    except CannotFollow as error:
        raise ValueError(str(error)) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise refused(model, batch, number, error) from error


class _Observer:
    """Hooks of one watched forward."""

    def __init__(
        self, model: nn.Module, blocks: Blocks, linears: Sequence[Linear], inputs: dict[str, Any], to_the_end: bool
    ) -> None:
        inputs = replaced(inputs, torch.Tensor, torch.clone)  # each in a storage of its own
        sources = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        plain, matrices = parted(linears)
        self.trace, self._blocks = Trace(), blocks
        self._masked = {name for name in (TOKENS, DECODED) if (value := sources.get(name)) is not None and value.dim() == 2}
        of = {TOKENS: [TOKENS, *SEQUENCES], DECODED: [DECODED, *sorted(DECODER_INPUTS)]}
        self._shapes = {
            mask: sources[name].shape[:2]  # of samples and positions
            for mask, names in of.items()
            for name in reversed(names)
            if name in sources and (sources[name].dim() == 2 or (name != mask and sources[name].dim() > 2))
        }
        self._model = model
        self._in_memory = ExitStack()  # the block that is running
        self._inside: list[list[Linear]] = [
            [linear for linear in plain if linear.name.startswith(f"{blocks.block_name(index)}.")]
            for index in range(len(blocks.modules))
        ]
        inside = {linear.name for linears in self._inside for linear in linears}
        self._lineage = Lineage(sources, _weights([linear for linear in plain if linear.name not in inside]))
        self._open: Any = None  # of the block that is running: its arguments, their versions, and the containers among them
        self._last: tuple[int, list[torch.Tensor], list[int]] | None = None
        with self._in_memory, ExitStack() as stack:
            for index, block in enumerate(blocks.modules):
                stack.callback(block.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._after(index)).remove)
            for linear in plain:
                for module in linear.modules:
                    stack.callback(module.register_forward_pre_hook(self._called(linear.name), with_kwargs=True).remove)
                    if not is_plain_linear(module):
                        stack.callback(module.register_forward_hook(self._returned(linear)).remove)
            stack.enter_context(verified(experts_in(matrices)))
            stack.enter_context(watched(experts_in(matrices), lambda found, call: self._call(found.name, call.hidden)))
            owners = owners_of(zip(blocks.names, blocks.modules, strict=True), (linear.name for linear in plain))
            self._rows = stack.enter_context(followed(owners.values())) if owners else None
            self._listed = owners.keys()
            if not to_the_end and (head := _head(model)) is not None:
                stack.callback(head.register_forward_pre_hook(_stop).remove)
            with uncompiled(model), self._lineage:
                stopped(lambda: forward(model, inputs))
        self._check_overwritten()
        self.trace.users, self.trace.hidden = self._lineage.users, self._lineage.hidden
        called = {name for names in self.trace.calls.values() for name in names}
        self.trace.read = self._lineage.read - called

    def _before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._lineage.block is not None:  # a block that another one calls is a part of it
                return
            self._check_overwritten()
            arguments, direct = tensors_in((args, kwargs)), _direct(args, kwargs)
            elements = frozenset(element for tensor in direct for element in self._lineage.of(tensor).elements)
            hidden = args[0] if args else kwargs.get(HIDDEN)
            chained = self._last is not None and bool(self._last[1]) and hidden is self._last[1][0]
            mask = _mask_of(self._lineage.of(hidden)) if isinstance(hidden, torch.Tensor) else TOKENS
            run = Run(index, chained, elements, mask, has_hidden=isinstance(hidden, torch.Tensor))
            self.trace.runs.append(run)
            self.trace.calls.setdefault(self._blocks.block_name(index), [])
            self._open = (arguments, [tensor._version for tensor in arguments], Changes((args, kwargs)))
            self._lineage.noting = False
            self._in_memory.enter_context(in_memory(self._model, index))
            self._lineage.noting = True
            self._lineage.watch(_weights(self._inside[index]))
            self._lineage.enter(index, direct, arguments)

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._lineage.block != index:
                return
            arguments, versions, changes = self._open
            if any(tensor._version != version for tensor, version in zip(arguments, versions, strict=True)):
                self.trace.overwritten.add(Element(index, ARGUMENT))
            entries = changes.found()
            tensors: list[torch.Tensor] = []
            run = self.trace.runs[-1]
            run.output = slots((output, entries), tensors)
            one = isinstance(output, torch.Tensor) or (isinstance(output, tuple) and len(output) == 1)
            run.plain, run.returns_tuple = one and len(tensors) == 1 and not entries, isinstance(output, tuple)
            self._lineage.leave(tensors)
            self._lineage.noting = False
            self._in_memory.close()
            self._lineage.noting = True
            self._last = (index, tensors, [tensor._version for tensor in tensors])

        return hook

    def _called(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._call(name, args[0] if args else kwargs["input"])

    def _returned(self, linear: Linear) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if args and not multiplies(linear, args[0], output):
                self.trace.otherwise.add(linear.name)

        return hook

    def _call(self, name: str, x: torch.Tensor) -> None:
        """Note a call of a linear, or of fused experts."""
        origin, place = self._lineage.of(x), self._lineage.block
        mask = _mask_of(origin)
        samples, length = self._shapes.get(TOKENS if mask == FITTING else mask or "", (0, 0))
        if samples != length and x.shape[:2] == (length, samples) and x.dim() > 2:
            mask = f"{mask}{BY_POSITION}"
        elif name in self._listed:
            if self._rows is None or self._rows(x) is None:
                self.trace.unclear[name] = unknown_tokens()
        elif mask in self._masked and fitted(x.shape, (samples, length)) is None:
            self.trace.unclear[name] = unclear(x.shape, (samples, length))
        self.trace.masks.setdefault(name, []).append(mask)
        self.trace.inputs.setdefault(name, self._lineage.identity(x))
        self.trace.calls[OUTSIDE if place is None else self._blocks.block_name(place)].append(name)
        if place is None:
            self.trace.outside |= origin.elements

    def _check_overwritten(self) -> None:
        """Note the outputs of the last block that were changed in place since it returned them."""
        if self._last is not None:
            index, tensors, versions = self._last
            for place, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
                if tensor._version != version:
                    self.trace.overwritten.add(Element(index, place))


def _weights(linears: Iterable[Linear]) -> dict[str, torch.Tensor]:
    return {linear.name: linear.weight for linear in linears}


def _mask_of(origin: Origin) -> str | None:
    """Return the padding mask of values made from these inputs of the model."""
    if origin.sources & DECODER_INPUTS:
        return DECODED
    if not origin.sources:
        return FITTING
    return TOKENS if origin.sources & MAIN_INPUTS else None


def _direct(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the tensors among a block's arguments; of those in mappings, only what the block reads counts."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _direct(tuple(value), {})
    return found


def _uncached(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return {"use_cache": False}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a model with towers
    return {"use_cache": False} if anything and (config is None or hasattr(text, "use_cache")) else {}


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = None if find is None else find()
    except NotImplementedError:
        return None
    return None if isinstance(head, nn.Embedding) else head  # of FSMT, whose decoder begins with it


_compilation: PutBack[None, Any] = PutBack(  # making the stance sets it, for all threads, and leaving it restores the one before
    lambda _: torch.compiler.set_stance("force_eager"), lambda _, stance: stance.__exit__(None, None, None)
)


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which functions that the model has compiled, such as flex attention, run op by op, so that they are seen."""
    compiles = "flex" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if not compiles and "torch._dynamo" not in sys.modules:  # whose import takes seconds
        return nullcontext()
    return _compilation.kept(None)


def _stop(module: nn.Module, args: tuple) -> None:
    raise Stop
