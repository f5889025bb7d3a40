"""Values that blocks are called with and return: tensors inside tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch


def replaced(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return a copy of `value` with each object of class `kind` in it replaced by what `function` makes of it.

    Tuples, lists and mappings are copied with all that they hold, in a fixed order, and so are dataclasses that hold such objects.
    Other objects are kept.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple):
        found = [replaced(entry, kind, function) for entry in value]
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    if isinstance(value, list):
        return [replaced(entry, kind, function) for entry in value]
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, entry in value.items():
            made[key] = replaced(entry, kind, function)
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        new = {name: replaced(entry, kind, function) for name, entry in entries.items()}
        if all(new[name] is entry for name, entry in entries.items()):
            return value
        copied: Any = copy.copy(value)
        for name, entry in new.items():
            object.__setattr__(copied, name, entry)
        return copied
    return value


def with_own_caches(value: Any) -> Any:
    """Return arguments with a copy of each cache of keys and values in them, which a block that runs twice would fill twice."""
    cache_utils = sys.modules.get("transformers.cache_utils")
    return value if cache_utils is None else replaced(value, cache_utils.Cache, copy.deepcopy)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return all tensors in `value`, in the order of `replaced`."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    replaced(value, torch.Tensor, keep)
    return found


def containers_in(value: Any) -> Iterator[MutableMapping | list]:
    """Yield the mappings and lists in `value`, whose entries a block may set."""
    if isinstance(value, (MutableMapping, list)):
        yield value
    entries: Any = ()
    if isinstance(value, (tuple, list)):
        entries = value
    elif isinstance(value, MutableMapping):
        entries = value.values()
    for entry in entries:
        yield from containers_in(entry)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a container among a block's arguments that the block has set.

    Attributes:
        container: the number of the container, in the order of `containers_in`.
        key: the key, or the index in a list.
        value: the new value.
    """

    container: int
    key: Any
    value: Any


class Changes:
    """The entries that a block sets in the containers among its arguments."""

    def __init__(self, arguments: Any) -> None:
        """Remember the entries of all containers in `arguments` before the block runs."""
        self._before = [(container, dict(_items(container))) for container in containers_in(arguments)]

    def found(self) -> list[Entry]:
        """Return the entries that differ now."""
        missing = object()
        return [
            Entry(number, key, value)
            for number, (container, before) in enumerate(self._before)
            for key, value in _items(container)
            if before.get(key, missing) is not value
        ]


def set_entries(arguments: Any, entries: list[Entry]) -> None:
    """Set the entries in the containers of `arguments`, as the block did that they were found in."""
    containers = list(containers_in(arguments))
    for entry in entries:
        container = containers[entry.container]
        if isinstance(container, list) and entry.key == len(container):
            container.append(entry.value)
        else:
            container[entry.key] = entry.value


def _items(container: MutableMapping | list) -> list[tuple[Any, Any]]:
    return list(enumerate(container)) if isinstance(container, list) else list(container.items())
