"""2:4 weights as PyTorch's semi-structured tensors, and products with them. Not measured on a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from .. import ops
from .._checks import check_tensor
from ..layouts.semi_structured import FORMATS
from ..ops.cusparselt_linear import DTYPES, cusparselt_linear
from ..ops.semi_structured_pack import check_fits

BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}


class SemiStructuredTensor(SparseSemiStructuredTensorCUSPARSELT):
    """PyTorch's cuSPARSELt tensor for inference, whose products search algorithm and plan once for each shape."""

    def _mm(
        self, B: torch.Tensor, *, bias: torch.Tensor | None = None, should_transpose_dense: bool = False, **kwargs: object
    ) -> torch.Tensor:
        if isinstance(B, SparseSemiStructuredTensor):
            raise ValueError("B: expected a dense tensor, got a semi-structured one; no hardware multiplies two of them")
        if self.packed is None:
            raise NotImplementedError(
                "a product with the transpose of a semi-structured tensor: only `x @ weight.t()` is supported"
            )
        # PyTorch 2.12 and later pass the activations as given, earlier ones transposed. The product has the same form.
        x = B if should_transpose_dense else B.t()
        product = cusparselt_linear(x, self.packed, self.shape[0], bias)
        return product if should_transpose_dense else product.t()


def to_semi_structured(
    weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *, backend: str | None = None
) -> SparseSemiStructuredTensor:
    """Convert a 2:4 weight to PyTorch's semi-structured tensor, which `torch.nn.functional.linear` takes as a weight.

    To use it in a layer, set `layer.weight = torch.nn.Parameter(to_semi_structured(layer.weight), requires_grad=False)`, also under
    `torch.compile`. It suits inference with batches of some hundred tokens; single tokens gain nothing. The speed has not been measured.

    Args:
        weight: `[out_features, in_features]`, 2:4 along its columns, any strides; or `(values, meta)` from `semi_structured_pack` or
            `semi_structured_prune_pack`, which "cutlass" takes unchanged.
        backend: "cusparselt" takes bfloat16 or float16 with a shape that is a multiple of (16, 16), or int8 with one of (32, 32), whose
            products are int8. The weight must be on the CUDA device that multiplies. "cutlass" also takes float32 (1:2). Its shape is
            a multiple of (32, 64), of (16, 128) for int8, or of (32, 32) for float32. Products need compute capability 8.x. None is
            "cusparselt" if available, since only it supports later devices.

    Returns:
        A `SparseSemiStructuredTensorCUSPARSELT` or `SparseSemiStructuredTensorCUTLASS`.

    Raises:
        TypeError: `weight` is neither a tensor nor a pair of tensors, or the backend does not take its dtype.
        ValueError: the backend does not take the shape or device, or the weight is not 2:4 or has a NaN.
        RuntimeError: this PyTorch or the weight's device lacks the backend.
    """
    if not isinstance(weight, torch.Tensor):
        values, meta = _pair(weight)
        backend = _backend_for(values, backend)
        _check(values, 2, backend)
        return _cutlass(values, meta) if backend == "cutlass" else _cusparselt(ops.semi_structured_unpack(values, meta))
    backend = _backend_for(weight, backend)
    _check(weight, 1, backend)
    if backend == "cutlass":
        return _cutlass(*ops.semi_structured_pack(weight.detach()))
    check_fits(weight)  # cuSPARSELt silently drops values that do not fit
    return _cusparselt(weight.detach().contiguous())


def _cutlass(values: torch.Tensor, meta: torch.Tensor) -> SparseSemiStructuredTensor:
    return _wrap(SparseSemiStructuredTensorCUTLASS, (values.shape[0], 2 * values.shape[1]), values, meta)


def _cusparselt(dense: torch.Tensor) -> SparseSemiStructuredTensor:
    kind = SemiStructuredTensor if dense.dtype in DTYPES else SparseSemiStructuredTensorCUSPARSELT
    return _wrap(kind, dense.shape, torch._cslt_compress(dense), None)


def semi_structured_linear(x: torch.Tensor, weight: SparseSemiStructuredTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `torch.nn.functional.linear(x, weight, bias)` without the CPU time of dispatching through the tensor subclass.

    Args:
        x: `[..., in_features]` of the weight's dtype, on its device.
        weight: from `to_semi_structured`.
        bias: `[out_features]` of the weight's dtype.

    Returns:
        `[..., out_features]` of `x`'s dtype.

    Raises:
        ValueError: `x` or `bias` does not match the weight in features, dtype or device.
    """
    for name, tensor, features in (("x", x, weight.shape[1]), ("bias", bias, weight.shape[0])):
        if tensor is not None and (
            tensor.shape[-1:] != (features,) or tensor.dtype != weight.dtype or tensor.device != weight.device
        ):
            raise ValueError(
                f"{name}: expected {features} features of {weight.dtype} on {weight.device}, got shape {tuple(tensor.shape)} of "
                f"{tensor.dtype} on {tensor.device}"
            )
    if not isinstance(weight, SemiStructuredTensor) or weight.packed is None:
        return functional.linear(x, weight, bias)
    product = cusparselt_linear(x.reshape(-1, x.shape[-1]), weight.packed, weight.shape[0], bias)
    return product.view(*x.shape[:-1], weight.shape[0])


def _pair(weight: object) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(weight, (tuple, list)) or len(weight) != 2 or not all(isinstance(part, torch.Tensor) for part in weight):
        raise TypeError(f"weight: expected a tensor or (values, meta), got {type(weight).__name__}")
    values, meta = weight
    return values, meta


def _backend_for(weight: torch.Tensor, asked: str | None) -> str:
    """Return the backend asked for, or a default for the weight.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: this PyTorch or the weight's device lacks it.
    """
    if asked not in (None, *BACKENDS):
        raise ValueError(f"backend: expected {' or '.join(map(repr, BACKENDS))}, got {asked!r}")
    available = torch.backends.cusparselt.is_available()
    takes_it = weight.is_cuda and weight.dtype in BACKENDS["cusparselt"]._DTYPE_SHAPE_CONSTRAINTS
    backend = asked or ("cusparselt" if available and takes_it else "cutlass")
    if backend == "cusparselt" and not available:
        raise RuntimeError("backend: this PyTorch has no cuSPARSELt; use 'cutlass'")
    if backend == "cutlass" and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] != 8:
        capability = ".".join(map(str, torch.cuda.get_device_capability(weight.device)))
        raise RuntimeError(f"backend: PyTorch's CUTLASS products need compute capability 8.x, {weight.device} has {capability}")
    return backend


def _check(weight: torch.Tensor, columns_per: int, backend: str) -> None:
    """Raise `TypeError` or `ValueError` unless the backend takes the weight.

    Args:
        weight: the weight or its packed values.
        columns_per: columns of the weight for each column of `weight`.
        backend: a key of `BACKENDS`.
    """
    rules = {
        dtype: (rule.sparse_min_rows, rule.sparse_min_cols) for dtype, rule in BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS.items()
    }
    check_tensor("weight", weight, ndim=2, dtypes=tuple(dtype for dtype in rules if dtype in FORMATS))
    shape, multiple = (weight.shape[0], weight.shape[1] * columns_per), rules[weight.dtype]
    if 0 in shape or shape[0] % multiple[0] or shape[1] % multiple[1]:
        raise ValueError(
            f"weight: expected a shape that is a positive multiple of {multiple} for {str(weight.dtype).removeprefix('torch.')} with "
            f"backend '{backend}', got {shape}"
        )
    if backend == "cusparselt" and not weight.is_cuda:
        raise ValueError(f"weight: expected a CUDA tensor with backend 'cusparselt', got one on {weight.device}")


def _wrap(
    kind: type[SparseSemiStructuredTensor], shape: tuple[int, ...], packed: torch.Tensor, meta: torch.Tensor | None
) -> SparseSemiStructuredTensor:
    return kind(torch.Size(shape), packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
