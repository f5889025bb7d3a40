"""`nm_q4_unpack`: unpack a weight that `nm_q4_pack` packed."""

from __future__ import annotations

import torch

from .._checks import check_tensor, check_whole
from ..layouts.nm_q4 import COLUMNS, Q4Layout, check_q4, pack_q4, unpack_q4
from ._registry import define_op, sample
from .nm_linear import sparse_weight
from .nm_q4_linear import check_q4_pattern, random_scales

SCHEMA = "(Tensor blocks, int n, int m, int out_features, int in_features) -> (Tensor weight, Tensor scales)"


def nm_q4_unpack(blocks: torch.Tensor, n: int, m: int, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack the dense weight and the scales that `nm_q4_pack` packed.

    The contents are checked, so that damaged or hostile input is refused.

    Args:
        blocks: `[strips, ceil(in_features / 64), bytes]` uint8.
        n: kept values of a group.
        m: columns of a group; it divides `in_features`. The patterns are 2:4, 1:4 and 4:16.
        out_features: rows of the weight.
        in_features: columns of the weight.

    Returns:
        weight: `[out_features, in_features]` float32, exactly the scales times whole numbers; `+0.0` where nothing is stored.
        scales: `[out_features, ceil(in_features / 64)]` float16.

    Raises:
        TypeError: a wrong dtype; a number is not whole.
        ValueError: a wrong shape; a pattern without a layout; scales that are not finite; positions that do not ascend, named by their
            row and group; another value than zero after the last row or column.
    """
    check_q4_pattern(n, m)
    check_whole("out_features", out_features, 0)
    check_whole("in_features", in_features, 0)
    if in_features % m:
        raise ValueError(f"in_features: expected a number divisible by m = {m}, got {in_features}")
    check_tensor("blocks", blocks, ndim=3, dtypes=(torch.uint8,), shape=Q4Layout(n, m).shape(out_features, in_features))
    return _op(blocks, n, m, out_features, in_features)


def reference(blocks: torch.Tensor, n: int, m: int, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_q4(blocks, n, m, out_features, in_features)
    return unpack_q4(blocks, n, m, out_features, in_features)


def _fake(blocks, n, m, out_features, in_features):
    torch._check(blocks.dim() == 3)
    scales = (out_features, -(-in_features // COLUMNS))
    return blocks.new_empty((out_features, in_features), dtype=torch.float32), blocks.new_empty(scales, dtype=torch.float16)


def _samples(generator: torch.Generator):
    for rows, columns, n, m in ((5, 24, 2, 4), (33, 136, 2, 4), (40, 128, 1, 4), (70, 1024, 4, 16)):
        weight = sparse_weight(rows, columns, n, m, torch.float32, generator)
        yield sample(pack_q4(weight, random_scales(rows, columns, generator), n, m), n, m, rows, columns)


_op = define_op("nm_q4_unpack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
