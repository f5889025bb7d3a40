"""A model whose blocks are read from its checkpoint when they are needed, and released afterwards.

The model is built by its own `from_pretrained`. Only the step that fills in the weights differs: tensors of blocks are converted on the
meta device, which checks all names and shapes without reading a value. The conversion of one block is repeated with its values
whenever the block is needed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from .checkpoint_conversion import convert, converted_back
from .freed_memory import give_back
from .lent import Lent
from .linears import mark_unread
from .staging import Staged, Staging, staging_for
from .stored_blocks import StoredBlocks
from .stored_files import Part, Place, Tensors
from .weight_files import dtype_of

META = torch.device("meta")
T = TypeVar("T")
_streams: weakref.WeakKeyDictionary[nn.Module, Stream] = weakref.WeakKeyDictionary()


def stream_of(model: nn.Module) -> Stream | None:
    """Return the stream of a streamed model, or None for any other model."""
    return _streams.get(model)


def refuse_streamed(model: nn.Module, why: str) -> None:
    """Raise `ValueError` if `model` is streamed. The message ends with `why`."""
    if stream_of(model) is not None:
        raise ValueError(f"model: expected one in memory, got a streamed one, {why}; load it without stream=True (--stream)")


@contextmanager
def in_memory(model: nn.Module, index: int, ahead: int = 1) -> Iterator[None]:
    """Keep block `index` of a streamed model in memory within, and read block `index + ahead` ahead. Other models are left alone."""
    stream = stream_of(model)
    if stream is None or index >= len(stream.blocks):
        yield
        return
    with stream.held(model, index):
        stream.read_ahead(index + ahead)
        yield


@contextmanager
def lent_blocks(model: nn.Module) -> Iterator[None]:
    """Let a forward within show its structure without reading all blocks: those of one kind have the weights of one of them, see `Lent`.

    Models in memory are left alone.
    """
    stream = stream_of(model)
    before = None if stream is None else stream.lent
    if stream is not None:
        stream.lent = before or Lent()
    try:
        yield
    finally:
        if stream is not None:
            stream.lent = before


class Stream(StoredBlocks):
    """The checkpoint of a model, whose blocks are read when they are needed and released afterwards.

    Attributes:
        save: `save_pretrained` of a streamed model, called with the model, the folder and further arguments.
        lent: lends weights to blocks that would be read otherwise; None where each block has its own.
    """

    save: ClassVar[Callable[..., None]]  # set by `runtime.save`, which imports this module

    def __init__(self, model: Any, files: Sequence[str], settings: Any, blocks: Sequence[str]) -> None:
        """Look at a checkpoint; see `StoredBlocks`."""
        super().__init__(model, files, settings, blocks)
        self._ahead: dict[int, Future[Tensors | Staged]] = {}
        self._staging: Staging | None = staging_for(self._device)
        self._files: ThreadPoolExecutor | None = None
        self._holders = [0] * len(self.blocks)
        self._wait: Callable[[int], None] | None = None
        self.lent: Lent | None = None

    def fill(self, model: Any) -> Any:
        """Read what belongs to no block, put tensors without values in the place of the rest, and return transformers' loading info."""
        empty = {name: torch.empty(stored.shape, dtype=dtype_of(stored), device=META) for name, stored in self.stored.items()}
        info = convert(model, empty, dataclasses.replace(self._settings, device_map={"": META}))
        self._convert(model, self._arrived(self._load(self._known)))
        blocks = [model.get_submodule(name) for name in self.blocks]
        self._buffers = [
            [(m, name) for m in block.modules() for name, held in m._buffers.items() if held is not None and held.is_meta]
            for block in blocks
        ]
        for index in range(len(self.blocks)):
            self.release(model, index)
        return info

    def attach(self, model: Any) -> None:
        """Make every forward of a block read the block, where it is not held, and release it afterwards."""
        _streams[model] = self
        for index, name in enumerate(self.blocks):
            block = model.get_submodule(name)
            block.forward = self._reading(weakref.ref(model), index, block.forward)
        reference = weakref.ref(model)
        model.save_pretrained = lambda folder, **options: type(self).save(reference(), folder, **options)

    @contextmanager
    def held(self, model: Any, index: int) -> Iterator[None]:
        """Keep block `index` in memory within."""
        if not self._holders[index]:
            self._read(model, index)
        self._holders[index] += 1
        try:
            yield
        finally:
            self._holders[index] -= 1
            if not self._holders[index]:
                self.release(model, index)
                give_back()

    @contextmanager
    def stopping(self, wait: Callable[[int], None]) -> Iterator[None]:
        """Call `wait` with the number of a block in front of every run of the block within."""
        self._wait = wait
        try:
            yield
        finally:
            self._wait = None

    def read_ahead(self, index: int) -> None:
        """Begin to read block `index`, if there is one, in another thread, unless it is held or blocks are lent."""
        if 0 <= index < len(self.blocks) and index not in self._ahead and not self._holders[index] and self.lent is None:
            self._ahead[index] = self.later(lambda: self._load(self.names[index]))

    def later(self, call: Callable[[], T]) -> Future[T]:
        """Make a call in the thread that reads and writes files, after all calls before it.

        Since there is one such thread, at most one block that is read ahead or still being written is in memory beside the held one.
        """
        self._files = self._files or ThreadPoolExecutor(1, "sparsekern-files")
        return self._files.submit(call)

    def release(self, model: Any, index: int) -> None:
        """Free the weights of block `index`."""
        for module in model.get_submodule(self.blocks[index]).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().to(META), parameter.requires_grad)
                    mark_unread(module._parameters[name])
        for module, name in self._buffers[index]:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=META)

    def as_stored(self, model: Any, index: int) -> Tensors:
        """Return the weights of block `index`, which is held, under the names and in the shapes of the checkpoint."""
        name = self.blocks[index]
        state = {f"{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
        return converted_back(model, state)

    def take_all(self, paths: Iterable[Path], parts: Iterable[Part] = ()) -> None:
        super().take_all(paths, parts)
        self._ahead.clear()  # what was read from the files before

    def move(self, index: int, place: Place) -> Place:
        self._ahead.pop(index, None)  # it was read from the place before
        return super().move(index, place)

    def put(self, model: Any, tensors: Tensors, part: Part | None) -> None:
        """Fill in weights of the model from the tensors of a part, or of the checkpoint itself.

        Raises:
            ValueError: they cannot be converted.
        """
        unpacked: Tensors = {}
        if part is not None and part.decode is not None:
            tensors, unpacked = part.decode(tensors)
        self._convert(model, tensors)
        for name, tensor in unpacked.items():
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            old = module._parameters[own]
            module._parameters[own] = nn.Parameter(tensor.to(self._device), requires_grad=old.requires_grad)

    def close(self) -> None:
        """Stop reading ahead, and end the thread that reads and writes."""
        if self._files is not None:
            self._files.shutdown(wait=True, cancel_futures=True)
            self._files = None
        self._ahead.clear()
        if self._staging is not None:
            self._staging.close()

    def _reading(self, model: weakref.ref, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._wait is not None:
                self._wait(index)
            with self.held(model(), index):
                return forward(*args, **kwargs)

        return run

    def _read(self, model: Any, index: int) -> None:
        """Fill in the weights of block `index`.

        Raises:
            ValueError: the checkpoint has changed since it was opened, or does not hold all of the block's tensors.
        """
        block = model.get_submodule(self.blocks[index])
        if self.lent is not None and self.lent.fill(block):
            return
        tensors = self._arrived((self._ahead.pop(index, None) or self.later(lambda: self._load(self.names[index]))).result())
        change, before = self._edits.get(index, (None, []))
        for held, own in before:
            held.update(own)  # in the shapes that the checkpoint gives them
        self.put(model, tensors, self.parts.get(index))
        del tensors  # of which `change` may make copies
        if change is not None:
            change(index)
        if self.lent is not None:
            self.lent.keep(block)
        if unread := [name for name, tensor in block.state_dict().items() if tensor.is_meta]:
            raise ValueError(f"model: the checkpoint holds no values for {self.blocks[index]}.{unread[0]}")
        if self._settings.hf_quantizer is not None:
            self._settings.hf_quantizer.check_block(block, self.blocks[index])

    def _load(self, names: Iterable[str]) -> Tensors | Staged:
        """Read tensors, and begin to copy them to a GPU."""
        stored = {name: self.stored[name] for name in names}
        if self._staging is None:
            return self._stamps.read(stored)
        self._stamps.check({entry.path for entry in stored.values()})
        return self._staging.load(stored, self._stamps.read_into)

    def _arrived(self, loaded: Tensors | Staged) -> Tensors:
        if isinstance(loaded, Staged):
            assert self._staging is not None
            return self._staging.arrived(loaded)
        return loaded

    @property
    def _device(self) -> torch.device:
        return torch.device(next(iter((self._settings.device_map or {"": "cpu"}).values())))

    def _convert(self, model: Any, tensors: Tensors) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        info = convert(model, tensors, self._settings)
        model._weight_conversions = conversions  # of the whole checkpoint, not only of these tensors
        if failed := next(iter(info.conversion_errors), None):
            raise ValueError(f"model: {failed} of the checkpoint cannot be loaded: {info.conversion_errors[failed]}")
