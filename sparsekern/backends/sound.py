"""Packed weights whose first product found nothing to refuse.

Checking the packed tensors waits for the device, which must not happen for every token. Only the first product of a weight is checked. If
the tensors are overwritten later, kernels still stay inside them.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Sound:
    """The weights that an op has found sound, for as long as their tensors live."""

    def __init__(self) -> None:
        self._found: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def has(self, values: torch.Tensor, *others: torch.Tensor) -> bool:
        """Return whether these very tensors were found sound together, with as many `values`."""
        first, *rest = others
        count, its = self._found.get(first, (None, ()))
        return count == len(values) and all(known() is tensor for known, tensor in zip(its, rest, strict=True))

    def add(self, values: torch.Tensor, *others: torch.Tensor) -> None:
        """Remember that these tensors are sound together."""
        first, *rest = others
        self._found[first] = len(values), [weakref.ref(tensor) for tensor in rest]
