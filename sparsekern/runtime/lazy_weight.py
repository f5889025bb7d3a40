"""`LazyWeight`: the weight of a packed layer for models that read it, unpacked by the first operation on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from .packed_weight import PackedWeight


class LazyWeight(torch.Tensor):
    """A weight that is only unpacked by operations. Its shape, dtype and device, which some models ask for, cost nothing.

    Each operation unpacks the weight again. Writing to it is refused, since the packed weight would not change.
    """

    packed: PackedWeight

    @staticmethod
    def of(packed: PackedWeight) -> torch.Tensor:
        """Return the weight of a packed layer as its dense layer stores it; the dense weight itself in a compiled graph."""
        if torch.compiler.is_compiling():
            return packed.as_stored()
        lazy: Any = torch.Tensor._make_wrapper_subclass(LazyWeight, packed.stored_shape, dtype=packed.dtype, device=packed.device)
        lazy.packed = packed
        lazy._is_hf_initialized = True  # the mark by which transformers leaves a tensor as it is
        return lazy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no classmethod here
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the dense weight."""
        if func._schema.is_mutable:
            raise ValueError(
                f"weight: expected to be read only, since it is packed, got a call of {func.__name__}; call sparsekern.unpack"
            )

        def unpack(value: Any) -> Any:
            return value.packed.as_stored() if isinstance(value, LazyWeight) else value

        return func(*tree_map(unpack, args), **tree_map(unpack, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        """Return the shape and dtype: the values are packed."""
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
