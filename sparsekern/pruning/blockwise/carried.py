"""Tensors of a GPU that wait in host memory, and are copied there and back while the GPU computes.

The host waits for no copy, unless it reads what was copied. The copies run one after another on a stream of their own, so that one back
follows the one that brought the values. There are four kinds of waiting, and each is needed:

* a copy to the host waits for the computation of what it reads;
* the GPU's memory that it reads is given away once it has ended;
* the computation waits for the copy back of what it reads;
* the GPU's memory of what came back is given to a later copy once the computation with it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...models.staging import CudaDevice, Device, Event


@dataclass(frozen=True)
class Carried:
    """Values in pinned host memory, or on their way there.

    Attributes:
        host: the memory, in the shape of the tensor.
        event: happens once the values are there; None where the host has written them.
    """

    host: torch.Tensor
    event: Event | None = None


@dataclass(frozen=True)
class Returning:
    """A tensor that is being copied to the GPU.

    Attributes:
        tensor: the tensor.
        event: happens once its values are there.
    """

    tensor: torch.Tensor
    event: Event


class Carrier:
    """The copies to and from one GPU.

    Attributes:
        place: the GPU.
    """

    def __init__(self, device: Device, place: torch.device) -> None:
        """Prepare copies to and from a device at `place`."""
        self._device, self.place = device, place

    def away(self, tensor: torch.Tensor) -> Carried:
        """Begin to copy a tensor to host memory. The caller may release it at once."""
        tensor = tensor.contiguous()
        found = self.room(tensor.shape, tensor.dtype)
        self._device.follow()
        self._device.copy(_bytes(found.host), _bytes(tensor))
        self._device.lent(tensor)
        return Carried(found.host, self._device.copied())

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Carried:
        """Return host memory for values that the host writes."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return Carried(self._device.pinned(size).view(dtype).view(tuple(shape)))

    @staticmethod
    def taken(size: int) -> int:
        """Return the bytes of pinned memory for `size` bytes: torch rounds each allocation up to a power of two."""
        return 1 << (size - 1).bit_length() if size else 0

    def values(self, carried: Carried) -> torch.Tensor:
        """Return the values in host memory, once they are there."""
        if carried.event is not None:
            self._device.finish(carried.event)
        return carried.host

    def back(self, carried: Carried) -> Returning:
        """Begin to copy values to the GPU."""
        found = self._device.empty(carried.host.shape, carried.host.dtype)
        self._device.copy(_bytes(found), _bytes(carried.host))
        return Returning(found, self._device.copied())

    def arrived(self, returning: Returning) -> torch.Tensor:
        """Return a tensor that the computation from now on may use, and that may be released at any time."""
        self._device.wait(returning.event)
        self._device.used(returning.tensor)
        return returning.tensor


def carrier_for(device: torch.device) -> Carrier | None:
    """Return what copies to and from a GPU; None for a CPU, whose tensors stay where they are."""
    return Carrier(CudaDevice(device), device) if device.type == "cuda" else None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
