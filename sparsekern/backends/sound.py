"""Packed weights whose first product found nothing to refuse.

Checking the packed tensors waits for the device, which must not happen for every token. Only the first product of a weight is checked. If
the tensors are overwritten later, kernels still stay inside them.
"""

from __future__ import annotations

import weakref

import torch


class Sound:
    """The weights that an op has found sound, for as long as their tensors live."""

    def __init__(self) -> None:
        # By the identity of the first tensor: a dictionary of weak keys takes longer than a small product.
        self._found: dict[int, tuple[weakref.ref[torch.Tensor], int, list[weakref.ref[torch.Tensor]]]] = {}

    def has(self, values: torch.Tensor, *others: torch.Tensor) -> bool:
        """Return whether these very tensors were found sound together, with as many `values`."""
        found = self._found.get(id(values))
        if found is None:
            return False
        own, count, its = found
        if own() is not values or count != values.shape[0]:
            return False
        for known, tensor in zip(its, others, strict=True):
            if known() is not tensor:
                return False
        return True

    def add(self, values: torch.Tensor, *others: torch.Tensor) -> None:
        """Remember that these tensors are sound together."""
        key, found = id(values), self._found

        def forget(gone: weakref.ref[torch.Tensor]) -> None:
            if key in found and found[key][0] is gone:
                del found[key]

        found[key] = weakref.ref(values, forget), values.shape[0], [weakref.ref(tensor) for tensor in others]
