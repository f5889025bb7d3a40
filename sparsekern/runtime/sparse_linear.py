"""`SparseLinear`: a linear layer that stores its weight packed and multiplies without unpacking it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends.table import Support
from ..models.linears import is_conv1d, linear_weight
from ..ops import cusparselt_linear
from .cusparselt import FEWEST_TOKENS, State, compress, supports_on
from .formats import format_of
from .lazy_weight import LazyWeight
from .packed_format import check_shape
from .packed_weight import PackedWeight

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class SparseLinear(PackedWeight):
    """A linear layer `x @ weight.T + bias` that stores its weight `[out_features, in_features]` in a packed format.

    Gradients flow to the input and the bias, not to the weight. On a CUDA device, a 2:4 layer can add a compressed copy of its weight
    for cuSPARSELt; see `compress`.

    Attributes:
        format: name of the packed format, such as `"bitmask"`.
        shape: `(out_features, in_features)`.
        bias: `[out_features]` parameter, or None.
        conv1d: whether the layer replaces a `Conv1D` of GPT-2, which `to_linear` then returns.
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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make a layer from packed tensors, whose contents only `check` checks. `from_linear` packs a dense layer.

        Args:
            format: name of the packed format.
            shape: `(out_features, in_features)`.
            tensors: the packed tensors by name.
            bias: `[out_features]` parameter, or None.
            conv1d: whether the layer replaces a `Conv1D`.
            trainable: whether the dense weight of `to_linear` takes gradients.
            dtype: dtype of the layer, where none of the packed tensors has it: in a format of 4-bit values.

        Raises:
            ValueError: the format is unknown, has other tensors, or `shape` is not that of a matrix.
        """
        check_shape(shape)
        super().__init__(format, shape, tensors, trainable=trainable, dtype=dtype)
        self.conv1d = conv1d
        self.register_parameter("bias", bias)
        self.keeps_compressed, self._compressed_from = False, None
        self.register_buffer("compressed", None, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str) -> SparseLinear:
        """Pack an `nn.Linear` or a `Conv1D` of transformers. The bias is shared with it.

        Args:
            linear: the dense layer, which is not changed.
            format: `"bitmask"`, `"N:M"` with M of at most 16, or for values of 4 bits `"2:4-q4"`, `"1:4-q4"` or `"4:16-q4"`. `"int8"`
                rounds the weight, and leaves no zeros out.

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
            dtype=weight.dtype,
        )
        return layer.train(linear.training)

    def to_linear(self) -> nn.Module:
        """Return a dense `nn.Linear`, or a `Conv1D`, that shares the bias."""
        weight = self.as_stored()
        linear: nn.Linear | Conv1D
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
            linear.weight = nn.Parameter(weight, requires_grad=self.trainable)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=self.trainable)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

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
        return supports_on(self.device, self.format, (self.out_features, self.in_features), self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the dense layer stores it, for models that read it; each operation on it unpacks it."""
        return LazyWeight.of(self)

    @property
    def stored_shape(self) -> torch.Size:
        """`(out_features, in_features)`, the reverse for a `Conv1D`."""
        return torch.Size(self.shape[::-1] if self.conv1d else self.shape)

    def as_stored(self) -> torch.Tensor:
        """Unpack the weight, `[out_features, in_features]`, transposed for a `Conv1D`."""
        return self.dense_weight().T.contiguous() if self.conv1d else self.dense_weight()

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `x @ weight.T + bias`.

        Args:
            x: `[..., in_features]` of the layer's dtype, or of another under autocast.

        Returns:
            `[..., out_features]`.

        Raises:
            TypeError: `x` is not a tensor, or has another dtype.
            ValueError: `x` has other features.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        tensors = self._held()
        bias = tensors["bias"]
        if x.dtype != self._dtype_in(tensors):
            x = self.cast(x)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, self)
        return self._product(x, tensors, bias)

    def _product(self, x: torch.Tensor, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        many = tensors["compressed"] is not None and x.shape[:-1].numel() >= FEWEST_TOKENS
        compressed = self._current_compressed() if many else None
        if compressed is None:
            return self.layout.linear(x, tensors, self.shape, bias)
        self.layout.check_input(x, tensors, self.shape)
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
        super()._apply(fn, recurse)
        self._remake_compressed()
        return self

    def _before_move(self) -> None:
        self._forget_compressed()  # it is made for one device, and its bits cannot be converted

    def _after_load(self, prefix: str, error_msgs: list[str]) -> None:
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
