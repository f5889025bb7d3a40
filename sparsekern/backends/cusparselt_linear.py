"""`cusparselt_linear` through the C++ library, which caches plans, instead of through torch."""

from __future__ import annotations

import functools

import torch

from .devices import Support
from .implementation import Implementation
from .table import availability

LIBRARY = "libcusparseLt.so.0"  # the name under which a CUDA build of torch loads it


def library() -> Support:
    """Return whether cuSPARSELt can be called directly instead of through torch."""
    available = availability("cuda")
    return _open(LIBRARY) if available.ok else available


@functools.cache
def _open(name: str) -> Support:
    try:
        torch.ops.sparsekern_cuda.cusparselt_open(name)
    except RuntimeError as error:
        return Support(False, str(error).splitlines()[0].removeprefix("cuSPARSELt: "))
    return Support(True)


def _supports(x, compressed, out_features, bias=None) -> Support:
    return library()


def _cuda(x: torch.Tensor, compressed: torch.Tensor, out_features: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Run the op with cached plans."""
    search = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    return torch.ops.sparsekern_cuda.cusparselt_linear(x, compressed, out_features, bias, search)


IMPLEMENTATIONS = (Implementation("cuda", _cuda, _supports),)
