"""Tensors that wait until they are needed again: in memory up to a limit, in a nameless file beyond it."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch

ALIGNED = mmap.ALLOCATIONGRANULARITY  # of which the place of a tensor is a multiple, so that it can be mapped


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in the file.

    Attributes:
        start: its first byte.
        size: the bytes that are set aside for it.
        shape: shape of the tensor.
        dtype: its dtype.
        device: the device that it came from.
    """

    start: int
    size: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Shelf:
    """Tensors by key.

    The file has no name, so that it is gone when the program ends in whatever way. With a limit, tensors of a GPU are kept in host
    memory.

    Attributes:
        in_memory: the bytes of the tensors that are in memory.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        """Begin with no tensors.

        Args:
            limit: the most bytes to keep in memory; None keeps all, on their devices.
            folder: where the file is made, once it is needed; None is the folder for temporary files.
        """
        self._limit, self._folder = limit, folder
        self._kept: dict[Hashable, tuple[torch.Tensor, torch.device]] = {}
        self._slots: dict[Hashable, Slot] = {}
        self._free: dict[int, list[int]] = {}  # starts of slots without a tensor, by their size
        self._end = 0
        self._file: FileIO | None = None
        self.in_memory = 0

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of the one of that key. It must not be changed afterwards.

        Raises:
            OSError: the disk refuses it. The message says how many bytes the file has.
        """
        self.drop(key)
        if self._limit is None:
            self._kept[key] = tensor, tensor.device
        elif self.in_memory + tensor.nbytes <= self._limit:
            self._kept[key] = tensor.to("cpu").contiguous(), tensor.device
            self.in_memory += tensor.nbytes
        elif tensor.numel():
            self._write(key, tensor)
        else:
            self._kept[key] = tensor, tensor.device

    def get(self, key: Hashable) -> torch.Tensor:
        """Return the tensor of a key, on the device that it came from."""
        if key in self._kept:
            tensor, device = self._kept[key]
            return tensor.to(device)
        slot = self._slots[key]
        found = torch.empty(slot.shape, dtype=slot.dtype)
        self._transfer(slot, found, FileIO.readinto)
        return found.to(slot.device)

    def rows(self, key: Hashable, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of the tensor of a key. Of a tensor in the file only these are read."""
        if key in self._kept:
            tensor, device = self._kept[key]
            return tensor[rows.to(tensor.device)].to(device)
        slot = self._slots[key]
        assert self._file is not None
        with mmap.mmap(self._file.fileno(), _bytes_of(slot), access=mmap.ACCESS_WRITE, offset=slot.start) as mapped:
            view = memoryview(mapped)
            whole = torch.frombuffer(cast(Any, view), dtype=slot.dtype).view(slot.shape)
            found = whole[rows.cpu()]
            del whole
            view.release()
        return found.to(slot.device)

    def drop(self, key: Hashable) -> None:
        """Forget the tensor of a key, if there is one."""
        if key in self._kept:
            tensor, _ = self._kept.pop(key)
            self.in_memory -= 0 if self._limit is None else tensor.nbytes
        if key in self._slots:
            slot = self._slots.pop(key)
            self._free.setdefault(slot.size, []).append(slot.start)

    def _write(self, key: Hashable, tensor: torch.Tensor) -> None:
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        free = self._free.get(size)
        start = free.pop() if free else self._end
        slot = Slot(start, size, tensor.shape, tensor.dtype, tensor.device)
        try:
            if self._file is None:
                self._file = cast(FileIO, tempfile.TemporaryFile(buffering=0, prefix="sparsekern-", dir=self._folder))
                weakref.finalize(self, self._file.close)
            self._transfer(slot, tensor.cpu().contiguous(), FileIO.write)
            self._file.truncate(max(self._end, start + size))
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            message = f"{error.strerror}: {where} needs {start + size:,} bytes for hidden states that exceed max_memory"
            raise OSError(error.errno, message) from error
        self._end = max(self._end, start + size)
        self._slots[key] = slot

    def _transfer(self, slot: Slot, tensor: torch.Tensor, move: Any) -> None:
        """Read or write the bytes of a tensor, with as many calls of `move` as the system takes."""
        assert self._file is not None
        self._file.seek(slot.start, os.SEEK_SET)
        left = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        while left:
            moved = move(self._file, left)
            if not moved:
                raise OSError(f"the file for hidden states ends at byte {self._file.tell():,}")
            left = left[moved:]


def _bytes_of(slot: Slot) -> int:
    return slot.shape.numel() * slot.dtype.itemsize
