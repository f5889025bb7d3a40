"""A model whose blocks are read from its checkpoint when they are needed, and released afterwards.

The model is built by its own `from_pretrained`. Only the step that fills in the weights differs: tensors of blocks are converted on the
meta device, which checks all names and shapes without reading a value. The conversion of one block is repeated with its values
whenever the block is needed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from .checkpoint_conversion import convert, converted_back
from .checkpoint_keys import names_in
from .freed_memory import give_back
from .lent import Lent
from .linears import mark_unread
from .staging import Staged, Staging, staging_for
from .stored_files import Part, Place, Tensors
from .stored_reading import Stamps, digest_of
from .weight_files import Stored, dtype_of, tensors_in

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
def in_memory(model: nn.Module, index: int) -> Iterator[None]:
    """Keep block `index` of a streamed model in memory within, and read the next block ahead. Other models are left alone."""
    stream = stream_of(model)
    if stream is None or index >= len(stream.blocks):
        yield
        return
    with stream.held(model, index):
        stream.read_ahead(index + 1)
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


class Stream:
    """The checkpoint of a model, from which its blocks are read.

    Attributes:
        blocks: the names of the blocks.
        stored: by the name of a tensor in the checkpoint, where it is.
        names: the checkpoint's tensors of each block, in the order of `blocks`.
        outside: the checkpoint's tensors that belong to no block, those that the model does not know among them.
        parts: by block, what was taken from another file.
        save: `save_pretrained` of a streamed model, called with the model, the folder and further arguments.
        lent: lends weights to blocks that would be read otherwise; None where each block has its own.
        zeros: by block, the number of zeros and of all weights, where they are known.
    """

    save: ClassVar[Callable[..., None]]  # set by `runtime.save`, which imports this module

    def __init__(self, model: Any, files: Sequence[str], settings: Any, blocks: Sequence[str]) -> None:
        """Look at a checkpoint. Only headers are read.

        Args:
            model: a transformers model on the meta device.
            files: its safetensors files.
            settings: the `LoadStateDictConfig` that transformers made for them.
            blocks: the names of the blocks.

        Raises:
            ValueError: a file is damaged, or a tensor of the checkpoint becomes a part of two blocks.
            OSError: a file cannot be read.
        """
        self.blocks, self._settings = tuple(blocks), settings
        self.stored: dict[str, Stored] = tensors_in(Path(file) for file in files)
        self._stamps = Stamps({stored.path for stored in self.stored.values()})
        self._stamps.check_lengths(self.stored)
        self.names: tuple[list[str], ...] = tuple([] for _ in self.blocks)
        self.outside: list[str] = []
        self._known: list[str] = []  # those of `outside` that the model reads
        for name, targets in names_in(model, self.stored, settings.weight_mapping or []).items():
            places = {self._block_of(target) for target in targets}
            if len(places) > 1:
                raise ValueError(f"model: {name} of the checkpoint belongs to several blocks, so they cannot be read one at a time")
            index = places.pop() if places else None
            if index is not None:
                self.names[index].append(name)
                continue
            self.outside.append(name)
            if targets:
                self._known.append(name)
        self._ahead: dict[int, Future[Tensors | Staged]] = {}
        self._staging: Staging | None = staging_for(self._device)
        self._files: ThreadPoolExecutor | None = None
        self._holders = [0] * len(self.blocks)
        self._wait: Callable[[int], None] | None = None
        self.lent: Lent | None = None
        self.zeros: dict[int, tuple[int, int]] = {}
        self.parts: dict[int, Part] = {}
        self._edits: dict[int, tuple[Callable[[int], object], list[tuple[dict[str, Any], dict[str, Any]]]]] = {}

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
        """Begin to read block `index` in another thread, unless it is held or blocks are lent."""
        if index < len(self.blocks) and index not in self._ahead and not self._holders[index] and self.lent is None:
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

    def edit(self, model: Any, index: int, change: Callable[[int], object] | None) -> None:
        """Call `change` with `index` whenever the block has been read, until it is taken from another file; None ends that.

        The block is not in memory. Its parameters have the shapes that the checkpoint gives them. The number of blocks stands for
        weights outside the blocks, which are in memory: they are marked as changed.
        """
        self._edits.pop(index, None)
        self.zeros.pop(index, None)
        if change is not None:
            modules = list(model.get_submodule(self.blocks[index]).modules()) if index < len(self.blocks) else []
            self._edits[index] = change, [(held, dict(held)) for m in modules for held in (m._parameters, m._buffers)]

    def is_edited(self, index: int) -> bool:
        """Return whether a block is changed whenever it has been read."""
        return index in self._edits

    def as_stored(self, model: Any, index: int) -> Tensors:
        """Return the weights of block `index`, which is held, under the names and in the shapes of the checkpoint."""
        name = self.blocks[index]
        state = {f"{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
        return converted_back(model, state)

    def read_outside(self, model: Any) -> dict[str, list[str]]:
        """Return by the name of a tensor outside the blocks its names in the model, for those that the model reads."""
        return {name: found for name, found in names_in(model, self.outside, self._settings.weight_mapping or []).items() if found}

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

    def take(self, path: Path, part: Part) -> Place | None:
        """Read a block, or tensors outside the blocks, from another file from now on. Return where the block was read from before.

        Raises:
            ValueError: the file is damaged, or lacks a tensor.
            OSError: the file cannot be read.
        """
        held = tensors_in([path])
        for name in part.names:
            if name not in held:
                raise ValueError(f"{path.name}: the file is damaged ({name} is not there)")
        self._stamps.add([path])
        return self._replace(part, {name: held[name] for name in part.names})

    @contextmanager
    def read_from(self, index: int, place: Place) -> Iterator[None]:
        """Read block `index` from another place within."""
        now = self.move(index, place)
        try:
            yield
        finally:
            self.move(index, now)

    def take_all(self, paths: Iterable[Path], parts: Iterable[Part] = ()) -> None:
        """Read all tensors from other files from now on.

        Args:
            paths: the files.
            parts: what they hold in another form than before.

        Raises:
            ValueError: a file is damaged.
            OSError: a file cannot be read.
        """
        held = tensors_in(paths := list(paths))
        self._stamps.add(paths)
        for part in parts:
            self._replace(part, {name: held[name] for name in part.names})
        self.stored |= {name: held[name] for name in self.stored.keys() & held.keys()}
        self._ahead.clear()  # what was read from the files before

    def _replace(self, part: Part, held: Mapping[str, Stored]) -> Place | None:
        if part.index < len(self.blocks):
            return self.move(part.index, Place(part.names, held, part))
        for name in part.replaced:
            del self.stored[name]
        self.stored |= held
        self.outside = sorted({*self.outside, *part.names}.difference(part.replaced))
        before = self.parts.get(part.index)
        self.parts[part.index] = dataclasses.replace(part, packed={**(before.packed if before else {}), **part.packed})
        self._edits.pop(part.index, None)
        return None

    def move(self, index: int, place: Place) -> Place:
        """Read block `index` from another place from now on, and return the one before."""
        self._ahead.pop(index, None)  # it was read from the place before
        names = tuple(self.names[index])
        held = {name: self.stored.pop(name) for name in names}
        before = Place(names, held, self.parts.pop(index, None), self._edits.pop(index, None))
        self.stored |= place.stored
        self.names[index][:] = place.names
        self.parts |= {} if place.part is None else {index: place.part}
        self._edits |= {} if place.edit is None else {index: place.edit}
        return before

    def check_unchanged(self) -> None:
        """Raise `ValueError` if a file of the checkpoint has changed since it was opened."""
        self._stamps.check({stored.path for stored in self.stored.values()})

    def size(self, index: int | None = None) -> int:
        """Return the bytes of block `index` in the checkpoint, or of all its tensors."""
        names: Iterable[str] = self.stored if index is None else self.names[index]
        return sum(self.stored[name].nbytes for name in names)

    def fingerprint(self, model: Any, without: Sequence[nn.Parameter] = ()) -> str:
        """Return a digest of the names, shapes and dtypes of the checkpoint's tensors, and of a few bytes of each.

        Args:
            model: the model.
            without: parameters whose tensors are left out.
        """
        ids = set(map(id, without))
        names = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}
        left_out = set(converted_back(model, names)) if names else set()
        if left_out:
            left_out |= {own for part in self.parts.values() for entry in part.packed.values() for own in entry["tensors"].values()}
        return digest_of({name: stored for name, stored in self.stored.items() if name not in left_out})

    def close(self) -> None:
        """Stop reading ahead, and end the thread that reads and writes."""
        if self._files is not None:
            self._files.shutdown(wait=True, cancel_futures=True)
            self._files = None
        self._ahead.clear()
        if self._staging is not None:
            self._staging.close()

    def _block_of(self, target: str) -> int | None:
        return next((index for index, block in enumerate(self.blocks) if target.startswith(f"{block}.")), None)

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
