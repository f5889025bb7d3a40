"""2:4 weights as PyTorch's semi-structured tensors, made by `semi_structured_pack`, and linear layers on them. Not measured on a GPU."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from .. import ops
from ..layouts.semi_structured import FORMATS
from ..ops.checks import check_tensor
from ..ops.cusparselt_linear import DTYPES, cusparselt_linear
from ..ops.semi_structured_pack import check_fits

BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}


class SemiStructuredTensor(SparseSemiStructuredTensorCUSPARSELT):
    """PyTorch's cuSPARSELt tensor for inference, whose products search algorithm and plan once for a shape (`cusparselt_linear`)."""

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **kwargs):
        if isinstance(B, SparseSemiStructuredTensor):
            raise ValueError("B: expected a dense tensor, got a semi-structured one; no hardware multiplies two of them")
        if self.packed is None:
            raise NotImplementedError(
                "a product with the transpose of a semi-structured tensor: only `x @ weight.t()` is supported"
            )
        # PyTorch 2.12 and later pass the activations as given, earlier ones transposed. Each wants the product in the same form.
        x = B if should_transpose_dense else B.t()
        product = cusparselt_linear(x, self.packed, self.shape[0], bias)
        return product if should_transpose_dense else product.t()


def to_semi_structured(
    weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor], *, backend: str | None = None
) -> SparseSemiStructuredTensor:
    """Make PyTorch's semi-structured tensor of a 2:4 weight, which `torch.nn.functional.linear` takes as a weight.

    `layer.weight = torch.nn.Parameter(to_semi_structured(layer.weight), requires_grad=False)` is all a linear layer needs, also under
    `torch.compile`. It is for inference with batches of some hundred tokens; single tokens gain nothing. Its speed has not been measured.

    Args:
        weight: `[out_features, in_features]`, 2:4 along its columns, any strides; or `(values, meta)` from `semi_structured_pack` or
            `semi_structured_prune_pack`, which "cutlass" takes unchanged.
        backend: "cusparselt": bfloat16 or float16, shape a multiple of (16, 16), or int8, of (32, 32), which PyTorch multiplies into
            int8; on the CUDA device that is to multiply. "cutlass": also float32 (1:2); shape a multiple of (32, 64), of int8
            (16, 128), of float32 (32, 32); to multiply it takes a device of compute capability 8.x. None: "cusparselt" where it can
            be had, since it is the one that later devices have.

    Returns:
        A `SparseSemiStructuredTensorCUSPARSELT` or `SparseSemiStructuredTensorCUTLASS`.

    Raises:
        TypeError: a wrong dtype for the backend, or neither a tensor nor a pair of tensors.
        ValueError: a wrong shape or device for the backend; a weight that is not 2:4, or has a NaN.
        RuntimeError: a backend that this PyTorch or the weight's device lacks.
    """
    packed = None if isinstance(weight, torch.Tensor) else _pair(weight)
    first, columns_per = (weight, 1) if packed is None else (packed[0], 2)
    backend = _backend_for(first, backend)
    _check(first, columns_per, backend)
    if backend == "cutlass":
        values, meta = ops.semi_structured_pack(weight.detach()) if packed is None else packed
        return _wrap(SparseSemiStructuredTensorCUTLASS, (values.shape[0], 2 * values.shape[1]), values, meta)
    if packed is None:
        check_fits(weight)  # cuSPARSELt drops silently what does not fit
    dense = weight.detach().contiguous() if packed is None else ops.semi_structured_unpack(*packed)
    kind = SemiStructuredTensor if dense.dtype in DTYPES else SparseSemiStructuredTensorCUSPARSELT
    return _wrap(kind, dense.shape, torch._cslt_compress(dense), None)


def semi_structured_linear(x: torch.Tensor, weight: SparseSemiStructuredTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `torch.nn.functional.linear(x, weight, bias)` without dispatching through the tensor subclass, which costs CPU time.

    Args:
        x: `[..., in_features]` of the weight's dtype, on its device.
        weight: from `to_semi_structured`.
        bias: `[out_features]` of the weight's dtype.

    Returns:
        `[..., out_features]` of `x`'s dtype.

    Raises:
        ValueError: features, dtype or device that are not the weight's.
    """
    for name, tensor, features in (("x", x, weight.shape[1]), ("bias", bias, weight.shape[0])):
        if tensor is not None and (
            tensor.shape[-1:] != (features,) or tensor.dtype != weight.dtype or tensor.device != weight.device
        ):
            raise ValueError(
                f"{name}: expected {features} features of {weight.dtype} on {weight.device}, got shape {tuple(tensor.shape)} of "
                f"{tensor.dtype} on {tensor.device}"
            )
    if not isinstance(weight, SemiStructuredTensor):
        return functional.linear(x, weight, bias)
    product = cusparselt_linear(x.reshape(-1, x.shape[-1]), weight.packed, weight.shape[0], bias)
    return product.view(*x.shape[:-1], weight.shape[0])


def _pair(weight) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(weight, (tuple, list)) or len(weight) != 2 or not all(isinstance(part, torch.Tensor) for part in weight):
        raise TypeError(f"weight: expected a tensor or (values, meta), got {type(weight).__name__}")
    return tuple(weight)


def _backend_for(weight: torch.Tensor, asked: str | None) -> str:
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
    """Raise unless the backend takes the weight; `weight` may be its packed values, each standing for `columns_per` columns."""
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


def _wrap(kind: type, shape, packed: torch.Tensor, meta: torch.Tensor | None) -> SparseSemiStructuredTensor:
    return kind(torch.Size(shape), packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
