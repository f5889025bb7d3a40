"""`bitmask_unpack`: unpack a weight that `bitmask_pack` packed."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_tensor, check_whole
from ..layouts.packed_rows import check_bitmask_rows, pack_bitmask_rows, tiles, unpack_bitmask_rows, words
from ._registry import define_op, sample
from .bitmask_linear import sparse_weight

SCHEMA = "(Tensor values, Tensor bitmask, Tensor starts, Tensor order, int features) -> Tensor"


def bitmask_unpack(
    values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, features: int
) -> torch.Tensor:
    """Unpack a dense weight: `bitmask_unpack(**bitmask_pack(weight), features=weight.shape[1])`.

    The contents of all tensors are checked before a value is read, so that damaged or hostile input is refused.

    Args:
        values: `[stored]` float32, bfloat16 or float16.
        bitmask: `[out_features, ceil(features / 64)]` int64.
        starts: `[ceil(out_features / 16) + 1]` int64.
        order: `[out_features]` int32.
        features: columns of the weight.

    Returns:
        `[out_features, features]` of the dtype of `values`, `+0.0` where no bit is set.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices; a set bit past the last column; values, starts or order that contradict the bits.
    """
    check_tensor("values", values, ndim=1, dtypes=HALF_OR_FLOAT)
    check_whole("features", features, 0)
    check_tensor("order", order, ndim=1, dtypes=(torch.int32,), device=values.device)
    rows = order.shape[0]
    check_tensor("bitmask", bitmask, ndim=2, dtypes=(torch.int64,), shape=(rows, words(features)), device=values.device)
    check_tensor("starts", starts, ndim=1, dtypes=(torch.int64,), shape=(tiles(rows) + 1,), device=values.device)
    return _op(values, bitmask, starts, order, features)


def reference(
    values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, features: int
) -> torch.Tensor:
    check_bitmask_rows(values, bitmask, starts, order, features)
    return unpack_bitmask_rows(values, bitmask, order, features)


def _fake(values, bitmask, starts, order, features):
    torch._check(values.dim() == 1 and order.dim() == 1)
    return values.new_empty((order.shape[0], features))


def _samples(generator: torch.Generator):
    for rows, columns, dtype in (
        (5, 24, torch.float32),
        (33, 71, torch.bfloat16),
        (18, 330, torch.float16),
        (70, 1024, torch.bfloat16),
    ):
        yield sample(*pack_bitmask_rows(sparse_weight(rows, columns, dtype, generator)).values(), columns)


_op = define_op("bitmask_unpack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
