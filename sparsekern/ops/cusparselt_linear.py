"""`cusparselt_linear`: a linear layer with a weight compressed by cuSPARSELt.

Neither this product nor the number of tokens from which it is faster has been measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ._registry import define_op

SCHEMA = "(Tensor x, Tensor compressed, int out_features, Tensor? bias=None) -> Tensor"
DTYPES = (torch.bfloat16, torch.float16)
TOKEN_MULTIPLE = 8  # rows of cuSPARSELt's 16-bit dense operands are a multiple of this


class Algorithm(NamedTuple):
    """An algorithm of cuSPARSELt, with its defaults.

    Attributes:
        alg_id: number of the algorithm.
        split_k: number of splits of the common index.
        split_k_mode: how the splits are summed.
    """

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


# Keys: device, dtype, out_features, in_features, tokens up to the next power of two, and whether there is a bias.
_algorithms: dict[tuple, Algorithm] = {}


def cusparselt_linear(
    x: torch.Tensor, compressed: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `x @ weight.T + bias` for a weight compressed by `torch._cslt_compress`. Runs on CUDA devices only.

    The algorithm is searched once per shape, dtype and device, at the first call outside a CUDA graph. Numbers of tokens up to the next
    power of two share it, so that prompts of any length cost at most a dozen searches.

    Args:
        x: `[tokens, in_features]` bfloat16 or float16 on a CUDA device, any strides, any number of tokens.
        compressed: the compressed weight, of the dtype of `x`.
        out_features: rows of the weight.
        bias: `[out_features]` of the dtype of `x`, or None.

    Returns:
        `[tokens, out_features]` of the dtype of `x`.

    Raises:
        ValueError: `x` on another device than `compressed`.
    """
    return _op(x, compressed, out_features, bias)


def through_torch(x: torch.Tensor, compressed: torch.Tensor, out_features: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Run the op through `torch._cslt_sparse_mm`, which makes a plan in each call."""
    if x.device != compressed.device:  # cuSPARSELt takes their addresses unchecked
        raise ValueError(f"x: expected a tensor on {compressed.device}, as the compressed weight, got one on {x.device}")
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty((0, out_features))
    padding = -tokens % TOKEN_MULTIPLE
    dense = (functional.pad(x, (0, 0, 0, padding)) if padding else x.contiguous()).t()
    algorithm = _algorithm_for(dense, compressed, out_features, bias)
    product = torch._cslt_sparse_mm(compressed, dense, bias=bias, transpose_result=True, **algorithm._asdict())
    return product[:tokens]


def _algorithm_for(dense, compressed, out_features, bias) -> Algorithm:
    in_features, tokens = dense.shape
    key = (dense.device.index, dense.dtype, out_features, in_features, (tokens - 1).bit_length(), bias is not None)
    if key not in _algorithms:
        if torch.cuda.is_current_stream_capturing():  # the search waits for the device
            return Algorithm()
        # Search on a copy: every available algorithm runs, and the library does not promise to leave its operands unchanged.
        search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]  # torch's stubs lack it
        found = search(compressed.clone(), dense, bias, None, None, True)
        _algorithms[key] = Algorithm(*found[:3])
    return _algorithms[key]


def _fake(x, compressed, out_features, bias=None):
    torch._check(x.dim() == 2)
    return x.new_empty((x.shape[0], out_features))


_op = define_op(
    "cusparselt_linear",
    SCHEMA,
    reference=through_torch,
    fake=_fake,
    samples=lambda generator: iter(()),
    only_on_cuda="only a GPU can read a weight that cuSPARSELt has compressed",
)
