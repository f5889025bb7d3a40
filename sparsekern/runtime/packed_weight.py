"""`PackedWeight`: a module that holds a weight in a packed format, the base of packed linears and packed experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from .expert_formats import layout_of
from .packed_format import Format, Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Self = TypeVar("Self", bound="PackedWeight")


class PackedWeight(nn.Module):
    """A weight in a packed format.

    The packed tensors are named, so they are in `state_dict()` and move with `.to(device)`. Values are frozen parameters, from which
    transformers takes the device of a model; other tensors are buffers. `.to(dtype)` takes float32, bfloat16 and float16.

    Attributes:
        format: name of the packed format, such as `"bitmask"`.
        shape: shape of the dense weight.
        layout: the format.
        trainable: whether the dense weight took gradients, as the unpacked one then does.
        owns_tensors: whether this module holds its packed tensors; if not, another one does and is saved with them.
    """

    owns_tensors: ClassVar[bool] = True

    def __init__(
        self,
        format: str,
        shape: Shape,
        tensors: Mapping[str, torch.Tensor],
        *,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make a weight from packed tensors.

        Args:
            format: name of the packed format.
            shape: shape of the dense weight.
            tensors: the packed tensors by name.
            trainable: whether the dense weight took gradients.
            dtype: dtype of the weight, where none of the tensors has it.
        """
        super().__init__()
        self.layout: Format = layout_of(format, shape)
        self.layout.check_names(tensors)
        self.format, self.trainable = format, trainable
        self.shape = self.layout.check_shape(shape)
        self._names = tuple(tensors)
        self._values = next((name for name, tensor in tensors.items() if self._is_typed(tensor)), None)
        self._dtype = dtype
        for name, tensor in tensors.items():
            if self._is_typed(tensor) or tensor.dtype == torch.int8:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def _is_typed(self, tensor: torch.Tensor) -> bool:
        """Return whether a packed tensor has the weight's dtype."""
        return self.layout.typed and tensor.is_floating_point()

    def dense_weight(self) -> torch.Tensor:
        """Unpack the weight."""
        return self.layout.unpack(self.tensors, self.shape, self.dtype)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape of the weight as the dense layer stores it."""
        return torch.Size(self.shape)

    def as_stored(self) -> torch.Tensor:
        """Unpack the weight as the dense layer stores it."""
        return self.dense_weight()

    def check(self) -> None:
        """Raise `ValueError` unless the sizes, counts and offsets of the packed tensors are those of the format."""
        self.layout.check(self.tensors, self.shape, self.dtype)

    def freeze(self) -> None:
        """Make the packed tensors take no gradients."""
        for name in self._names:
            if (parameter := self._parameters.get(name)) is not None:
                parameter.requires_grad_(False)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Packed tensors by name."""
        held = self._held()
        return {name: held[name] for name in self._names}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self._dtype_in(self._held())

    def _dtype_in(self, held: Mapping[str, torch.Tensor]) -> torch.dtype:
        return self._dtype if self._values is None else held[self._values].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self._held()[self._names[0]].device

    @property
    def stored_values(self) -> int:
        """The number of stored values: the non-zeros and the padding of the format."""
        return self.layout.stored_values(self.tensors, self.shape)

    @property
    def density(self) -> float:
        """Share of the weight that is stored: the non-zeros and the padding of the format."""
        return self.stored_values / max(1, torch.Size(self.shape).numel())

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` in the weight's dtype under autocast, else unchanged."""
        dtype = self.dtype
        return x.to(dtype) if x.dtype != dtype and not x.is_meta and torch.is_autocast_enabled(x.device.type) else x

    def _held(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the module without `Module.__getattr__`, whose cost one token of a small layer notices."""
        return self._buffers | self._parameters  # type: ignore[operator]  # only optional ones may be None

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = self.dtype
        after = fn(torch.empty(0, dtype=before, device=self.device)).dtype
        self._check_move(before, after)
        self._before_move()
        if self._values is None:
            kept = {name: tensor for name in self._names if (tensor := self._buffers.get(name)) is not None}
            super()._apply(fn, recurse)
            for name, tensor in kept.items():  # such as scales, which have a dtype of their own
                if (moved := self.get_buffer(name)).dtype != tensor.dtype:
                    self._buffers[name] = tensor.to(moved.device)
            self._dtype = after
        elif after.itemsize == before.itemsize:
            super()._apply(fn, recurse)
        else:  # half values share a slot of four bytes, so float32 has another layout
            self._repack(fn, recurse)
        return self

    def _before_move(self) -> None:
        """Do what precedes a move to another device or dtype."""

    def _check_move(self, before: torch.dtype, after: torch.dtype) -> None:
        kind = type(self).__name__
        if after not in DTYPES:
            raise TypeError(
                f"{kind}: expected float32, bfloat16 or float16, got {str(after).removeprefix('torch.')}; "
                "sparsekern.unpack makes dense layers, which take any dtype"
            )
        if self.device.type == "meta" and self._values is not None and after.itemsize != before.itemsize:
            raise NotImplementedError(f"{kind}: a layer without data cannot be converted to {str(after).removeprefix('torch.')}")

    def _repack(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> None:
        """Convert the weight to a dtype of another size."""
        dense = fn(self.dense_weight())
        super()._apply(fn, recurse)
        for name, tensor in self.layout.pack(dense).items():
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                self._buffers[name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        held = self.tensors
        given = {name: tensor for name in self._names if isinstance(tensor := state_dict.get(prefix + name), torch.Tensor)}
        if set(given) == set(held) and all(tensor.shape == held[name].shape for name, tensor in given.items()):
            try:  # before they replace tensors that the kernels trust
                self.layout.check(given, self.shape, self.dtype)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._after_load(prefix, error_msgs)

    def _after_load(self, prefix: str, error_msgs: list[str]) -> None:
        """Do what follows the loading of new tensors; append errors to `error_msgs`."""
