"""The lineage of each tensor in a forward: the values of earlier blocks, and the inputs of the model, that it was made from.

The blocks' own work is cut out. What a block returns has that block alone as its origin, and the replay of a forward stores it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..values import tensors_in

ARGUMENT = -1  # the place of a block's arguments, in elements
KEPT_INSIDE = -2  # the place of a tensor that a block made and did not return


class Element(NamedTuple):
    """One tensor that a block returned: the block, and the place of the tensor among all that it returned."""

    block: int
    place: int


@dataclass(frozen=True)
class Origin:
    """What a tensor was made from.

    Attributes:
        elements: tensors that blocks returned.
        sources: names of the model's inputs.
    """

    elements: frozenset[Element] = frozenset()
    sources: frozenset[str] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        return Origin(self.elements | other.elements, self.sources | other.sources)


NOTHING = Origin()


class Lineage(TorchDispatchMode):
    """Watches every op of a forward.

    Attributes:
        users: for each element, the blocks that read it.
        hidden: pairs of blocks of which the second reads a tensor of the first that it was not given.
        read: names of the watched tensors that an op has read.
        block: the block that is running; None between the blocks.
        noting: False while weights are read from files or released, which is no use of them.
    """

    supports_higher_order_operators = True  # such as flex_attention

    def __init__(self, sources: Mapping[str, torch.Tensor], watched: Mapping[str, torch.Tensor]) -> None:
        """Begin.

        Args:
            sources: the model's inputs by name, each in a storage of its own.
            watched: tensors by name whose use is noted.
        """
        super().__init__()
        self._storages = _Storages()
        self.users: dict[Element, set[int]] = {}
        self.hidden: list[tuple[int, int]] = []
        self.read: set[str] = set()
        self._watched: dict[int, dict[tuple[int, int], str]] = {}  # by storage, the names by the bytes that a tensor takes of it
        self.watch(watched)
        self._outside = {self._storages.key(tensor): Origin(sources=frozenset({name})) for name, tensor in sources.items()}
        self._inside: dict[int, Origin] = {}
        self._made: set[int] = set()
        self._given: set[int] = set()
        self.block: int | None = None
        self.noting = True

    def watch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note the use of further tensors, by name. Of two that take the same bytes of a storage the later one counts."""
        for name, tensor in tensors.items():
            self._watched.setdefault(self._storages.key(tensor), {})[_bytes_of(tensor)] = name

    def of(self, tensor: torch.Tensor) -> Origin:
        """Return the origin of a tensor."""
        key = self._storages.key(tensor)
        return self._inside.get(key) or self._outside.get(key, NOTHING)

    def identity(self, tensor: torch.Tensor) -> Hashable:
        """Return what tells a tensor from all others of the forward that have another storage or place in it."""
        return self._storages.key(tensor), tensor.storage_offset()

    def enter(self, block: int, used: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> None:
        """Begin the run of a block.

        Args:
            block: the block.
            used: its arguments, hidden states first. All of them count as used.
            given: all tensors that it is given, of which those that it reads count as used.
        """
        self.block, self._inside, self._made = block, {}, set()
        self._given = set(map(self._storages.key, given))
        for place, tensor in enumerate(used):
            key = self._storages.key(tensor)
            origin = self._outside.get(key, NOTHING)
            self.used(origin, block)
            # What is made of positions alone, such as a rotary table that blocks share, is the same for all blocks.
            changing = place == 0 or bool(origin.elements)
            self._inside[key] = origin | Origin(frozenset({Element(block, ARGUMENT)})) if changing else origin

    def leave(self, returned: Iterable[torch.Tensor]) -> None:
        """End the run of a block that has returned these tensors."""
        block = self.block
        assert block is not None
        inside, self._inside, self.block = self._inside, {}, None
        for key in self._made:
            elements = frozenset({Element(block, KEPT_INSIDE)}) if inside[key].elements else frozenset()
            self._outside[key] = Origin(elements, inside[key].sources)
        for place, tensor in enumerate(returned):
            key = self._storages.key(tensor)
            before = self._outside.get(key, NOTHING)
            elements = frozenset(element for element in before.elements if element != Element(block, KEPT_INSIDE))
            self._outside[key] = Origin(elements | {Element(block, place)}, before.sources)

    def used(self, origin: Origin, block: int) -> None:
        """Note that `block` uses a tensor of this origin."""
        for element in origin.elements:
            self.users.setdefault(element, set()).add(block)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        inputs = {self._storages.key(tensor) for tensor in given}
        for tensor in given if self.noting else ():
            if (inside := self._watched.get(self._storages.key(tensor))) is not None:
                start, end = _bytes_of(tensor)
                self.read.update(name for (first, last), name in inside.items() if first < end and start < last)
        origin = NOTHING
        for key in inputs:
            origin = origin | self._read(key)
        written = {self._storages.key(tensor) for tensor in _written(func, args, kwargs)}
        made = {self._storages.key(tensor) for tensor in tensors_in(result)} - inputs
        place = self._outside if self.block is None else self._inside
        for key in written | made:
            place[key] = origin
        if self.block is not None:
            self._made |= written | made
        return result

    def _read(self, key: int) -> Origin:
        if self.block is None or key in self._inside:
            return (self._outside if self.block is None else self._inside).get(key, NOTHING)
        origin = self._outside.get(key, NOTHING)
        self.used(origin, self.block)
        if key not in self._given:
            self.hidden += [(element.block, self.block) for element in sorted(origin.elements)]
        return origin


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for index, argument in enumerate(getattr(getattr(func, "_schema", None), "arguments", ())):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[index] if index < len(args) else kwargs.get(argument.name))


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte that a tensor takes of its storage, and the one behind the last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset()
    return int(start * tensor.itemsize), int((start + last + 1) * tensor.itemsize)


class _Storages:
    """Keys of storages. A weak reference keeps the address of each, so that no later one gets the same key."""

    def __init__(self) -> None:
        self._references: dict[int, StorageWeakRef] = {}

    def key(self, tensor: torch.Tensor) -> int:
        """Return the key of a tensor's storage."""
        reference = StorageWeakRef(tensor.untyped_storage())
        return self._references.setdefault(reference.cdata, reference).cdata
