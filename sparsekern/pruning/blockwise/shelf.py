"""Tensors that wait until they are needed again: in memory up to a limit, in a nameless file beyond it.

Those of a GPU are copied there and back while it computes, see `carried.py`: the one that is expected next is on its way back, and one is
on its way to the file.
"""

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

from .carried import Carried, Carrier, Returning

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
        in_memory: the bytes that tensors take in memory, those of a GPU in pinned memory.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None, carrier: Carrier | None = None) -> None:
        """Begin with no tensors.

        Args:
            limit: the most bytes to keep in memory; None keeps all, on their devices.
            folder: where the file is made, once it is needed; None is the folder for temporary files.
            carrier: copies to and from the GPU that the tensors are on; None for a CPU.
        """
        self._limit, self._folder, self._carrier = limit, folder, carrier
        self._carried: dict[Hashable, Carried] = {}
        self._returning: dict[Hashable, Returning] = {}
        self._leaving: tuple[Hashable, Slot, Carried] | None = None  # on its way to the file
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
            return
        carrier = self._carrier_of(tensor.device)
        size = tensor.nbytes if carrier is None else carrier.taken(tensor.nbytes)
        if self.in_memory + size <= self._limit:
            if carrier is not None:
                self._carried[key] = carrier.away(tensor)
            else:
                self._kept[key] = tensor.to("cpu").contiguous(), tensor.device
            self.in_memory += size
        elif tensor.numel():
            self._write(key, tensor)
        else:
            self._kept[key] = tensor, tensor.device

    def get(self, key: Hashable) -> torch.Tensor:
        """Return the tensor of a key, on the device that it came from."""
        if key in self._kept:
            tensor, device = self._kept[key]
            return tensor.to(device)
        self.expect(key)
        if self._carrier is not None and key in self._returning:
            return self._carrier.arrived(self._returning.pop(key))
        slot = self._slots[key]
        found = torch.empty(slot.shape, dtype=slot.dtype)
        self._transfer(slot, found, FileIO.readinto)
        return found.to(slot.device)

    def expect(self, key: Hashable) -> None:
        """Begin to bring the tensor of a key to the GPU, if it is elsewhere and not on its way."""
        if self._carrier is None or key in self._returning:
            return
        carried, slot = self._carried.get(key), self._slots.get(key)
        if carried is None and slot is not None and self._carrier_of(slot.device) is not None:
            self._finish_leaving(key)
            carried = self._carrier.room(slot.shape, slot.dtype)
            self._transfer(slot, carried.host, FileIO.readinto)
        if carried is not None:
            self._returning[key] = self._carrier.back(carried)

    def shape(self, key: Hashable) -> torch.Size:
        """Return the shape of the tensor of a key, which is not read."""
        if key in self._kept:
            return self._kept[key][0].shape
        return self._carried[key].host.shape if key in self._carried else self._slots[key].shape

    def rows(self, key: Hashable, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of the tensor of a key. Of a tensor in the file only these are read."""
        if key in self._kept:
            tensor, device = self._kept[key]
            return tensor[rows.to(tensor.device)].to(device)
        if self._carrier is not None and key in self._carried:
            return self._carrier.values(self._carried[key])[rows.cpu()].to(self._carrier.place)
        slot = self._slots[key]
        self._finish_leaving(key)
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
        if key in self._carried:
            self.in_memory -= Carrier.taken(self._carried.pop(key).host.nbytes)
        self._returning.pop(key, None)
        if self._leaving is not None and self._leaving[0] == key:
            self._leaving = None
        if key in self._slots:
            slot = self._slots.pop(key)
            self._free.setdefault(slot.size, []).append(slot.start)

    def _write(self, key: Hashable, tensor: torch.Tensor) -> None:
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        free = self._free.get(size)
        start = free.pop() if free else self._end
        slot = Slot(start, size, tensor.shape, tensor.dtype, tensor.device)
        if (carrier := self._carrier_of(tensor.device)) is not None:
            carried = carrier.away(tensor)
            self._finish_leaving()
            self._leaving = key, slot, carried
        else:
            self._store(slot, tensor.cpu().contiguous())
        self._end = max(self._end, start + size)
        self._slots[key] = slot

    def _carrier_of(self, device: torch.device) -> Carrier | None:
        return self._carrier if self._carrier is not None and self._carrier.place == device else None

    def _finish_leaving(self, key: Hashable | None = None) -> None:
        """Write the tensor that is on its way to the file, if there is one, or if it is that of a key."""
        if self._leaving is None or self._carrier is None or key not in (None, self._leaving[0]):
            return
        (_, slot, carried), self._leaving = self._leaving, None
        self._store(slot, self._carrier.values(carried))

    def _store(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Write a tensor to its place in the file, which is made with the first one."""
        end = slot.start + slot.size
        try:
            if self._file is None:
                self._file = cast(FileIO, tempfile.TemporaryFile(buffering=0, prefix="sparsekern-", dir=self._folder))
                weakref.finalize(self, self._file.close)
            self._transfer(slot, tensor, FileIO.write)
            self._file.truncate(max(os.fstat(self._file.fileno()).st_size, end))
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            message = f"{error.strerror}: {where} needs {end:,} bytes for hidden states that do not stay in memory"
            raise OSError(error.errno, message) from error

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


class Kept:
    """A tensor that is on a shelf as long as there is a reference to this object.

    Attributes:
        shape: shape of the tensor.
        dtype: its dtype.
    """

    def __init__(self, shelf: Shelf, tensor: torch.Tensor) -> None:
        """Put a tensor on a shelf. It must not be changed afterwards."""
        key = object()
        shelf.put(key, tensor)
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self._shelf, self._key = shelf, key
        weakref.finalize(self, shelf.drop, key).atexit = False

    def get(self) -> torch.Tensor:
        """Return the tensor."""
        return self._shelf.get(self._key)


class Loaded:
    """Tensors of a shelf in use: those of one place are one object, whose place is known."""

    def __init__(self) -> None:
        """Begin with none."""
        self._tensors: dict[int, tuple[Kept, torch.Tensor]] = {}  # by the id of the place
        self._places: dict[int, Kept] = {}  # by the id of the tensor

    def tensor(self, kept: Kept) -> torch.Tensor:
        """Return the tensor of a place, which is read when it is asked for first."""
        if id(kept) not in self._tensors:
            found = kept.get()
            self._tensors[id(kept)], self._places[id(found)] = (kept, found), kept
        return self._tensors[id(kept)][1]

    def place(self, tensor: torch.Tensor) -> Kept | None:
        """Return the place of a tensor that `tensor` has returned; None of any other."""
        return self._places.get(id(tensor))


def _bytes_of(slot: Slot) -> int:
    return slot.shape.numel() * slot.dtype.itemsize
