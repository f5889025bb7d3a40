"""A hand-written product of one token with a dense bfloat16 weight, compiled on its first use."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


@cache
def dense_gemv():
    """Return `dense_gemv(x, weight)`: `[1, in_features]` times `[out_features, in_features]`, both bfloat16; needs AVX-512."""
    from torch.utils.cpp_extension import load

    load(
        "sparsekern_bench",
        [str(ROOT / "baselines" / "dense_gemv.cpp")],
        extra_cflags=["-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        extra_include_paths=[str(ROOT / "csrc")],
        is_python_module=False,
    )
    return torch.ops.sparsekern_bench.dense_gemv
