"""Compressed copies of 2:4 weights for cuSPARSELt: which weights can have one, and the fewest tokens it is used for.

A 2:4 `SparseLinear` on a CUDA device multiplies up to 16 tokens by its packed weight, and unpacks the weight for more. The copy that
cuSPARSELt has compressed multiplies many tokens without unpacking. Only cuSPARSELt can read that copy, so both weights are kept. Each
takes 9/16 of the dense weight.

Nothing here has been measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..backends.table import YES, Support
from ..ops.cusparselt_linear import DTYPES
from ..ops.semi_structured_pack import check_fits
from .semi_structured import BACKENDS

FORMAT = "2:4"
LEAST_CAPABILITY = (8, 0)

# Not measured on any device: see bench/NOTES.md. `python -m bench.gpu --only ops -k "from how many tokens"` measures the right value.
FEWEST_TOKENS = 128


def supports(
    format: str, shape: tuple[int, int], dtype: torch.dtype, capability: tuple[int, int] | None, has_library: bool
) -> Support:
    """Return whether cuSPARSELt can multiply by a packed weight, with the reason if not.

    Args:
        format: name of the packed format.
        shape: `(out_features, in_features)`.
        dtype: dtype of the values.
        capability: compute capability of the weight's CUDA device. None for another device.
        has_library: whether this PyTorch has cuSPARSELt.
    """
    if format != FORMAT:
        return Support(False, f"its format is {format!r}, and cuSPARSELt multiplies by {FORMAT!r}")
    if dtype not in DTYPES:
        return Support(False, f"its values are {str(dtype).removeprefix('torch.')}, expected bfloat16 or float16")
    rule = BACKENDS["cusparselt"]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = rule.sparse_min_rows, rule.sparse_min_cols
    if 0 in shape or shape[0] % rows or shape[1] % columns:
        return Support(False, f"its shape is {tuple(shape)}, expected a positive multiple of ({rows}, {columns})")
    if capability is None:
        return Support(False, "it is not on a CUDA device")
    if capability < LEAST_CAPABILITY:
        return Support(
            False, "its device has compute capability {}.{}, expected at least {}.{}".format(*capability, *LEAST_CAPABILITY)
        )
    return YES if has_library else Support(False, "this PyTorch has no cuSPARSELt")


def supports_on(device: torch.device, format: str, shape: tuple[int, int], dtype: torch.dtype) -> Support:
    """Return the result of `supports` for a weight on `device`."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return supports(format, shape, dtype, capability, torch.backends.cusparselt.is_available())


def compress(weight: torch.Tensor) -> torch.Tensor:
    """Compress a 2:4 weight for `cusparselt_linear`.

    Raises:
        ValueError: the weight is not 2:4 or has a NaN. cuSPARSELt itself silently drops values that do not fit.
    """
    check_fits(weight)
    return torch._cslt_compress(weight.contiguous())


class State:
    """The identities and versions of tensors, which reveal replaced tensors and later writes.

    Tensors made in inference mode do not count their changes, and writes through `.data` are never counted. The tensors are referenced,
    so that no others can reuse their addresses.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._counted = self._count(self._tensors)

    def is_of(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether these are the same tensors without counted changes."""
        return self._counted == self._count(tensors)

    @staticmethod
    def _count(tensors: Iterable[torch.Tensor]) -> tuple[tuple[int, int | None], ...]:
        return tuple((tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors)
