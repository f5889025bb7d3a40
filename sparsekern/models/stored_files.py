"""Safetensors files made of tensors in other files, which are copied byte for byte, and parts of a model in files of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .weight_files import INDEX, SINGLE, Stored, bits_of, tensors_in

CHUNK = 8 << 20  # bytes that are in memory at once while a tensor is copied
Tensors = dict[str, torch.Tensor]
Decode = Callable[[Tensors], tuple[Tensors, Tensors]]


@dataclass(frozen=True)
class Part:
    """The tensors of a file that take the place of the checkpoint's own.

    Attributes:
        index: the block that they are; the number of blocks for tensors outside the blocks.
        names: the names of the tensors.
        format: the format of the file.
        packed: the description of each packed layer among them, by its name in the model.
        replaced: the names of tensors outside the blocks that they take the place of. Those of a block are all replaced.
        decode: returns of the tensors by name those that the checkpoint's rules apply to, and unpacked weights by their name in the
            model. None: the rules apply to all.
    """

    index: int
    names: tuple[str, ...]
    format: str = "dense"
    packed: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    decode: Decode | None = None


@dataclass(frozen=True)
class Place:
    """Where a block is read from.

    Attributes:
        names: the names of its tensors.
        stored: the place of each in a file.
        part: what the file holds; None for the checkpoint that the model was loaded from.
        edit: what is changed whenever the block has been read; None for nothing.
    """

    names: tuple[str, ...]
    stored: Mapping[str, Stored]
    part: Part | None = None
    edit: Any = None


def write_stored_tensors(stored: Mapping[str, Stored], folder: Path) -> None:
    """Write weight files with tensors of other files, and an index. A file all of whose tensors are wanted is linked, if that is possible.

    The files of the user come first, then those of the unfinished run, each by name. Where the folders lie does not matter.

    Args:
        stored: the place of each tensor, by name.
        folder: the folder to write to.

    Raises:
        ValueError: a file is damaged.
        OSError: the disk refuses.
    """
    by_path: dict[Path, dict[str, Stored]] = {}
    for tensor, entry in stored.items():
        by_path.setdefault(entry.path, {})[tensor] = entry
    weight_map: dict[str, str] = {}
    for number, path in enumerate(sorted(by_path, key=lambda path: (_is_of_run(path, folder), path.name, path)), 1):
        name, entries = shard_name(number, len(by_path)), by_path[path]
        weight_map |= dict.fromkeys(entries, name)
        if tensors_in([path]).keys() != entries.keys() or not _linked(path, folder / name):
            write_file(folder / name, entries)
    size = sum(entry.nbytes for entry in stored.values())
    write_index(folder, weight_map, size)


def write_index(folder: Path, weight_map: Mapping[str, str], size: int) -> None:
    """Write the index of the weight files in `folder`: the file of each tensor, and the bytes of all."""
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _linked(path: Path, target: Path) -> bool:
    """Give a file of an unfinished run a second name, and return whether that worked. Files of the user are copied."""
    if not _is_of_run(path, target.parent):
        return False
    try:
        os.link(path, target)
    except OSError:  # the file system has no links
        return False
    return True


def _is_of_run(path: Path, folder: Path) -> bool:
    """Return whether a file is one of the unfinished run whose output `folder` is."""
    return path.parent.parent in (folder, folder.parent)


def shard_name(number: int, count: int) -> str:
    """Return the name of weight file `number`, counted from 1, of `count`."""
    return f"{SINGLE.removesuffix('.safetensors')}-{number:05d}-of-{count:05d}.safetensors"


def write_file(path: Path, stored: Mapping[str, Stored]) -> None:
    """Write a safetensors file of tensors from other files, a chunk at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    stored = dict(sorted(stored.items(), key=lambda item: (-bits_of(item[1].dtype), item[0])))  # so that each is aligned
    for name, entry in stored.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name, entry in stored.items():
            _copy(name, entry, output)


def _copy(name: str, entry: Stored, output: Any) -> None:
    left = entry.nbytes
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ValueError(f"{entry.path.name}: {name}: the file is damaged (it ends before the tensor)")
            output.write(chunk)
            left -= len(chunk)
