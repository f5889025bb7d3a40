"""`bitmask_pack`: a sparse weight as its non-zero values and one bit a weight."""

from __future__ import annotations

import torch

from ._checks import HALF_OR_FLOAT, check_no_nan, check_tensor
from ._registry import define_op, sample

SCHEMA = "(Tensor weight) -> (Tensor values, Tensor bitmask)"


def bitmask_pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a weight of any sparsity into its non-zero values, in row-major order, and a bitmask.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16, any strides. `-0.0` counts as zero.

    Returns:
        `(values, bitmask)`: `[non-zeros]` of the weight's dtype; `[out_features, ceil(in_features / 8)]` uint8, where bit `j % 8`
        (the lowest is 0) of byte `j // 8` stands for column `j`, and the bits past the last column are 0.

    Raises:
        TypeError, ValueError: wrong dtype or shape; a NaN.
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    return _op(weight)


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_no_nan("weight", weight)
    rows, columns = weight.shape
    flags = weight != 0
    padded = torch.nn.functional.pad(flags, (0, -columns % 8)).view(rows, (columns + 7) // 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    bitmask = (padded.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)
    return weight[flags], bitmask


def _fake(weight):
    torch._check(weight.dim() == 2)
    rows, columns = weight.shape
    non_zeros = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(non_zeros), weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)


def sparse_weight(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) > 0.5)).to(dtype)


def _samples(generator: torch.Generator):
    for rows, columns, dtype in ((5, 24, torch.float32), (33, 71, torch.bfloat16), (16, 130, torch.float16)):
        weight = sparse_weight(rows, columns, dtype, generator)
        yield sample(weight)
        yield sample(-weight.T.contiguous().T)


_op = define_op("bitmask_pack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
