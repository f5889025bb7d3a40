"""Where the tensors of a checkpoint are, block by block, and what is read from other files than the checkpoint's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint_conversion import converted_back
from .checkpoint_keys import names_in
from .stored_files import Part, Place
from .stored_reading import Stamps, digest_of
from .weight_files import Stored, tensors_in


class StoredBlocks:
    """The places of a checkpoint's tensors.

    Attributes:
        blocks: the names of the blocks.
        stored: by the name of a tensor in the checkpoint, where it is.
        names: the checkpoint's tensors of each block, in the order of `blocks`.
        outside: the checkpoint's tensors that belong to no block, those that the model does not know among them.
        parts: by block, what was taken from another file.
        zeros: by block, the number of zeros and of all weights, where they are known.
    """

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
        self.zeros: dict[int, tuple[int, int]] = {}
        self.parts: dict[int, Part] = {}
        self._edits: dict[int, tuple[Callable[[int], object], list[tuple[dict[str, Any], dict[str, Any]]]]] = {}

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

    def read_outside(self, model: Any) -> dict[str, list[str]]:
        """Return by the name of a tensor outside the blocks its names in the model, for those that the model reads."""
        return {name: found for name, found in names_in(model, self.outside, self._settings.weight_mapping or []).items() if found}

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

    def _block_of(self, target: str) -> int | None:
        return next((index for index, block in enumerate(self.blocks) if target.startswith(f"{block}.")), None)
