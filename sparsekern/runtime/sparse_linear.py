"""`SparseLinear`: a linear layer that stores its weight packed and multiplies without unpacking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends.table import Support
from ..models.linears import is_conv1d, linear_weight
from ..ops import cusparselt_linear
from .cusparselt import FEWEST_TOKENS, State, compress, supports_on
from .formats import check_shape, format_of

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseLinear(nn.Module):
    """A linear layer `x @ weight.T + bias` that stores its weight `[out_features, in_features]` in a packed format.

    The packed tensors are named, so they are in `state_dict()` and move with `.to(device)`. Tensors of floating point are frozen
    parameters, the others buffers. Gradients flow to the input and the bias, not to the weight. `.to(dtype)` takes float32, bfloat16
    and float16. On a CUDA device, a 2:4 layer can add a compressed copy of its weight for cuSPARSELt; see `compress`.

    Attributes:
        format: name of the packed format, such as `"bitmask"`.
        shape: `(out_features, in_features)`.
        bias: `[out_features]` parameter, or None.
        conv1d: whether the layer replaces a `Conv1D` of GPT-2, which `to_linear` then returns.
        trainable: whether the dense weight took gradients, as that of `to_linear` then does.
        keeps_compressed: whether `compress` has requested a compressed copy.
        compressed: the compressed copy, a buffer outside `state_dict()`, or None.

    Example:
        >>> linear = torch.nn.Linear(4, 1, bias=False)
        >>> linear.weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
        >>> layer = sparsekern.SparseLinear.from_linear(linear, "2:4")
        >>> layer(torch.ones(1, 4))
        tensor([[3.]])
    """

    bias: nn.Parameter | None
    compressed: torch.Tensor | None
    _compressed_from: State | None

    def __init__(
        self,
        format: str,
        shape: tuple[int, int],
        tensors: dict[str, torch.Tensor],
        bias: nn.Parameter | None = None,
        *,
        conv1d: bool = False,
        trainable: bool = True,
    ) -> None:
        """Make a layer from packed tensors, whose contents only `check` checks. `from_linear` packs a dense layer.

        Args:
            format: name of the packed format.
            shape: `(out_features, in_features)`.
            tensors: the packed tensors by name.
            bias: `[out_features]` parameter, or None.
            conv1d: whether the layer replaces a `Conv1D`.
            trainable: whether the dense weight of `to_linear` takes gradients.

        Raises:
            ValueError: the format is unknown, has other tensors, or `shape` is no shape of a matrix.
        """
        super().__init__()
        self._layout = format_of(format)
        self._layout.check_names(tensors)
        self.format, self.shape, self.conv1d, self.trainable = format, check_shape(shape), conv1d, trainable
        self._names = tuple(tensors)
        self._values = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)
        self.keeps_compressed, self._compressed_from = False, None
        self.register_buffer("compressed", None, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str) -> SparseLinear:
        """Pack an `nn.Linear` or a `Conv1D` of transformers. The bias is shared with it.

        Args:
            linear: the dense layer, which is not changed.
            format: `"bitmask"`, or `"N:M"` with M of at most 16.

        Raises:
            TypeError: `linear` is another module, or its dtype cannot be packed.
            ValueError: the format is unknown, or the weight does not fit it.
        """
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(f"linear: expected an nn.Linear or a Conv1D, got {type(linear).__name__}")
        weight = linear_weight(linear)
        tensors = format_of(format).pack(weight)
        layer = cls(
            format,
            (weight.shape[0], weight.shape[1]),
            tensors,
            linear.bias,
            conv1d=is_conv1d(linear),
            trainable=linear.weight.requires_grad,
        )
        return layer.train(linear.training)

    def to_linear(self) -> nn.Module:
        """Return a dense `nn.Linear`, or a `Conv1D`, that shares the bias."""
        weight = self.dense_weight()
        linear: nn.Linear | Conv1D
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
            linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=self.trainable)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=self.trainable)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def dense_weight(self) -> torch.Tensor:
        """Unpack the weight, `[out_features, in_features]`."""
        return self._layout.unpack(self.tensors, self.shape, self.dtype)

    def check(self) -> None:
        """Raise `ValueError` unless the sizes, counts and offsets of the packed tensors are those of the format."""
        self._layout.check(self.tensors, self.shape, self.dtype)

    def compress(self) -> None:
        """Add a compressed copy of the weight for products of at least `cusparselt.FEWEST_TOKENS` tokens by cuSPARSELt.

        These products run on the sparse tensor cores without unpacking. The copy takes as much memory as the packed weight; both take
        1.125 times the dense weight. Products of fewer tokens, saving and `state_dict()` use the packed weight.

        The copy is remade when the layer moves to a dtype or device that can hold one, and when a state dict is loaded. It is also
        remade in the first product of a copied layer, or after a write to a packed tensor. PyTorch does not count writes through
        `.data`, to tensors made in inference mode, or in a compiled model. Call this method again after them.

        Neither the speed nor the number of tokens has been measured, and no such product has run on a GPU yet. Tests marked `gpu`
        cover it.

        Raises:
            ValueError: cuSPARSELt cannot hold this layer, for the reason in `supports_compressed`, or the weight has a NaN.
        """
        if not (support := self.supports_compressed()).ok:
            raise ValueError(f"SparseLinear: cuSPARSELt cannot hold this weight, {support.reason}")
        self.keeps_compressed = True
        try:
            self._remake_compressed()
        except ValueError:
            self.keeps_compressed = False
            raise

    def drop_compressed(self) -> None:
        """Free the compressed copy, if there is one."""
        self.keeps_compressed = False
        self._remake_compressed()

    def supports_compressed(self) -> Support:
        """Return whether `compress` works on the current device, with the reason if not."""
        return supports_on(self.device, self.format, self.shape, self.dtype)

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
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self._held()[self._values].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self._held()[self._values].device

    @property
    def density(self) -> float:
        """Share of the weight that is stored: the non-zeros and the padding of the format."""
        stored = sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())
        return stored / max(1, self.out_features * self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `x @ weight.T + bias`.

        Args:
            x: `[..., in_features]` of the layer's dtype, or of another under autocast.

        Returns:
            `[..., out_features]`.

        Raises:
            TypeError: `x` is no tensor, or has another dtype.
            ValueError: `x` has other features.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        tensors = self._held()
        bias, dtype = tensors["bias"], tensors[self._values].dtype
        if x.dtype != dtype and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, self)
        return self._product(x, tensors, bias)

    def _held(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the layer without `Module.__getattr__`, whose cost one token of a small layer notices."""
        return self._buffers | self._parameters  # type: ignore[operator]  # only bias and compressed may be None

    def _product(self, x: torch.Tensor, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        many = tensors["compressed"] is not None and x.shape[:-1].numel() >= FEWEST_TOKENS
        compressed = self._current_compressed() if many else None
        if compressed is None:
            return self._layout.linear(x, tensors, self.shape, bias)
        self._layout.check_input(x, tensors, self.shape)
        product = cusparselt_linear(x.reshape(-1, self.in_features), compressed, self.out_features, bias)
        return product.view(*x.shape[:-1], self.out_features)

    def _current_compressed(self) -> torch.Tensor | None:
        if not torch.compiler.is_compiling():
            made_from = self._compressed_from
            if made_from is None or not made_from.is_of(self.tensors.values()):
                self._remake_compressed()
        return self.compressed

    def _remake_compressed(self) -> None:
        """Remake the compressed copy, or set it to None if it is not requested or not supported."""
        self._forget_compressed()  # frees its memory before the next is made
        if self.keeps_compressed and self.supports_compressed().ok:
            made_from = State(self.tensors.values())
            self.compressed = compress(self.dense_weight())
            self._compressed_from = made_from

    def _forget_compressed(self) -> None:
        self.compressed = self._compressed_from = None

    def __getstate__(self) -> dict[str, object]:
        """Return the state for copies and pickles, whose tensors have counted no changes yet."""
        return {**self.__dict__, "_compressed_from": None}

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, density={self.density:.1%}" + (", compressed" if self.compressed is not None else "")
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        before = self.dtype
        after = fn(torch.empty(0, dtype=before, device=self.device)).dtype
        self._check_move(before, after)
        self._forget_compressed()  # it is made for one device, and its bits cannot be converted
        if after.itemsize == before.itemsize:
            super()._apply(fn, recurse)
        else:  # half values share a slot of four bytes, so float32 has another layout
            self._repack(fn, recurse)
        self._remake_compressed()
        return self

    def _check_move(self, before: torch.dtype, after: torch.dtype) -> None:
        if after not in DTYPES:
            raise TypeError(
                f"SparseLinear: expected float32, bfloat16 or float16, got {str(after).removeprefix('torch.')}; "
                "sparsekern.unpack makes dense layers, which take any dtype"
            )
        if self.device.type == "meta" and after.itemsize != before.itemsize:
            raise NotImplementedError(
                f"SparseLinear: a layer without data cannot be converted to {str(after).removeprefix('torch.')}"
            )

    def _repack(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> None:
        """Convert the weight to a dtype of another size."""
        dense = fn(self.dense_weight())
        super()._apply(fn, recurse)
        for name, tensor in self._layout.pack(dense).items():
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
                self._layout.check(given, self.shape, self.dtype)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        try:
            self._remake_compressed()
        except ValueError as error:  # a NaN
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")


class _Product(torch.autograd.Function):
    """The product with gradients to the input and the bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: SparseLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer._product(x, layer._held(), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        to_x, to_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.layer.dense_weight() if to_x else None
        return grad_x, grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, None
