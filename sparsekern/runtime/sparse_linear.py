"""`SparseLinear`: a linear layer that keeps its weight packed and multiplies by it as it lies."""

from __future__ import annotations

import torch
from torch import nn

from ..backends.table import Support
from ..models.linears import is_conv1d, linear_weight
from ..ops import cusparselt_linear
from .cusparselt import FEWEST_TOKENS, State, compress, supports_on
from .formats import check_shape, format_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseLinear(nn.Module):
    """`x @ weight.T + bias` for a weight of `[out_features, in_features]` that is held in a packed format.

    The packed tensors have names of their own, so they are in `state_dict()` and move with `.to(device)`: those of floating point are
    frozen parameters, the others buffers. Gradients flow to the input and to the bias, not to the weight. `.to(dtype)` takes float32,
    bfloat16 and float16.

    On a CUDA device a 2:4 layer can hold its weight a second time for cuSPARSELt: see `compress`.

    Attributes:
        format: name of the packed format, such as `"bitmask"`.
        shape: `(out_features, in_features)`.
        bias: `[out_features]` parameter or None.
        conv1d: it stands for a `Conv1D` of GPT-2, and `to_linear` makes one again.
        trainable: the weight that it stands for took gradients, and so will that of `to_linear`.
        keeps_compressed: `compress` has asked for a second, compressed weight.
        compressed: that weight, a buffer that is not in `state_dict()`; None where there is none.
    """

    bias: nn.Parameter | None
    compressed: torch.Tensor | None

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
        """Take packed tensors as they are; nothing but `check` looks into them. `from_linear` packs a layer.

        Raises:
            ValueError: an unknown format; other tensors than it has; a shape that is none.
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
        """Pack an `nn.Linear`, or a `Conv1D` of transformers; the bias is shared with it.

        Raises:
            TypeError: another kind of module, or a dtype that the format does not take.
            ValueError: a weight that does not fit the format.
        """
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(f"linear: expected an nn.Linear or a Conv1D, got {type(linear).__name__}")
        weight = linear_weight(linear)
        tensors = format_of(format).pack(weight)
        layer = cls(
            format, tuple(weight.shape), tensors, linear.bias, conv1d=is_conv1d(linear), trainable=linear.weight.requires_grad
        )
        return layer.train(linear.training)

    def to_linear(self) -> nn.Module:
        """The dense layer again: an `nn.Linear` (or a `Conv1D`), with the bias shared."""
        weight = self.dense_weight()
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
            linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=self.trainable)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=self.trainable)
        linear.bias = self.bias
        return linear.train(self.training)

    def dense_weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, unpacked anew."""
        return self._layout.unpack(self.tensors, self.shape, self.dtype)

    def check(self) -> None:
        """Raise `ValueError` unless the packed tensors are what the format says: sizes, counts and offsets."""
        self._layout.check(self.tensors, self.shape, self.dtype)

    def compress(self) -> None:
        """Hold the weight a second time, as cuSPARSELt reads it, for products of at least `cusparselt.FEWEST_TOKENS` tokens.

        It takes as much memory again as the packed weight: 1.125 times the dense weight in all, in return for products of many tokens
        on the sparse tensor cores without unpacking. Products of fewer tokens, saving and `state_dict()` use the packed weight. The
        second weight is made here, and again when the layer moves to another dtype or device (where that can hold one), when a state
        dict is loaded, in the first product of a copy, and in the first product after a packed tensor was written to. Writes that
        PyTorch does not count are not noticed: those through `.data`, to tensors made in inference mode, and in a compiled model.
        Call this again after them.

        Neither its speed nor the number of tokens has been measured, and no product by it has run on a GPU yet. The tests for one are
        marked `gpu`.

        Raises:
            ValueError: cuSPARSELt cannot hold this layer, with the reason (`supports_compressed`); a weight with a NaN.
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
        """Free the second weight that `compress` made, if there is one."""
        self.keeps_compressed = False
        self._remake_compressed()

    def supports_compressed(self) -> Support:
        """Return whether `compress` works where the layer is now, with the reason if not."""
        return supports_on(self.device, self.format, self.shape, self.dtype)

    def freeze(self) -> None:
        """The packed tensors take no gradients."""
        for name in self._names:
            if name in self._parameters:
                self._parameters[name].requires_grad_(False)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The packed tensors by name."""
        return {name: self._parameters[name] if name in self._parameters else self._buffers[name] for name in self._names}

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._parameters[self._values].dtype

    @property
    def device(self) -> torch.device:
        return self._parameters[self._values].device

    @property
    def density(self) -> float:
        """The share of the weight's values that are stored: the non-zeros, and what the format pads them with."""
        stored = sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())
        return stored / max(1, self.out_features * self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        tensors = self._buffers | self._parameters  # past Module.__getattr__, which one token of a small layer notices
        bias, dtype = tensors["bias"], tensors[self._values].dtype
        if x.dtype != dtype and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, self)
        return self._product(x, tensors, bias)

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
        """Make the compressed weight anew; None where it is not asked for or cannot be had."""
        self._forget_compressed()  # before the next is made
        if self.keeps_compressed and self.supports_compressed().ok:
            made_from = State(self.tensors.values())
            self.compressed = compress(self.dense_weight())
            self._compressed_from = made_from

    def _forget_compressed(self) -> None:
        self.compressed = self._compressed_from = None

    def __getstate__(self) -> dict:
        """For copies and pickles, whose tensors have counted no changes yet."""
        return {**self.__dict__, "_compressed_from": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, density={self.density:.1%}" + (", compressed" if self.compressed is not None else "")
        )

    def _apply(self, fn, recurse: bool = True):
        before = self.dtype
        after = fn(torch.empty(0, dtype=before, device=self.device)).dtype
        self._check_move(before, after)
        self._forget_compressed()  # which is for one device, and its bits are no values to convert
        if after.itemsize == before.itemsize:
            super()._apply(fn, recurse)
        else:  # half values share a slot of four bytes, so the layout of float32 is another
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

    def _repack(self, fn, recurse: bool) -> None:
        dense = fn(self.dense_weight())
        super()._apply(fn, recurse)
        for name, tensor in self._layout.pack(dense).items():
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                self._buffers[name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        given = {name: state_dict.get(prefix + name) for name in self._names}
        if all(isinstance(tensor, torch.Tensor) and tensor.shape == self.tensors[name].shape for name, tensor in given.items()):
            try:  # before they take the place of tensors that the kernels trust
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
    """The product, with gradients to the input and the bias."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return layer._product(x, layer._buffers | layer._parameters, bias)

    @staticmethod
    def backward(ctx, grad):
        to_x, to_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.layer.dense_weight() if to_x else None
        return grad_x, grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, None
