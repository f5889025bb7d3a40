"""`bitmask_unpack`: the dense weight of what `bitmask_pack` packed."""

from __future__ import annotations

import torch

from ._checks import HALF_OR_FLOAT, check_tensor, check_whole
from ._registry import define_op, sample
from .bitmask_pack import reference as pack
from .bitmask_pack import sparse_weight

SCHEMA = "(Tensor values, Tensor bitmask, int features) -> Tensor"


def bitmask_unpack(values: torch.Tensor, bitmask: torch.Tensor, features: int) -> torch.Tensor:
    """Unpack values and bitmask (see `bitmask_pack`) into a dense weight.

    Args:
        values: `[non-zeros]` float32, bfloat16 or float16.
        bitmask: `[out_features, ceil(features / 8)]` uint8.
        features: columns of the weight.

    Returns:
        `[out_features, features]` of the dtype of `values`, `+0.0` where no bit is set.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; a set bit past the last column; not as many values as set bits.
            Both are checked before any value is read, so damaged or hostile input is refused.
    """
    check_tensor("values", values, ndim=1, dtypes=HALF_OR_FLOAT)
    check_whole("features", features, 0)
    shape = (None, (features + 7) // 8)
    check_tensor("bitmask", bitmask, ndim=2, dtypes=(torch.uint8,), shape=shape, device=values.device)
    return _op(values, bitmask, features)


def reference(values: torch.Tensor, bitmask: torch.Tensor, features: int) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    flags = ((bitmask.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)
    stray = flags[:, features:].any(1)
    if stray.any():
        raise ValueError(f"bitmask: expected zeros past column {features - 1}, got a set bit in row {int(stray.nonzero()[0])}")
    flags = flags[:, :features]
    if int(flags.sum()) != values.numel():
        raise ValueError(f"values: expected as many as bits are set in bitmask ({int(flags.sum())}), got {values.numel()}")
    weight = torch.zeros(flags.shape, dtype=values.dtype, device=values.device)
    return weight.masked_scatter_(flags, values)


def _fake(values, bitmask, features):
    torch._check(values.dim() == 1 and bitmask.dim() == 2)
    return values.new_empty((bitmask.shape[0], features))


def _samples(generator: torch.Generator):
    for rows, columns, dtype in ((5, 24, torch.float32), (33, 71, torch.bfloat16), (16, 130, torch.float16)):
        values, bitmask = pack(sparse_weight(rows, columns, dtype, generator))
        yield sample(values, bitmask, columns)
        yield sample(values.repeat_interleave(2)[::2], bitmask.T.contiguous().T, columns)


_op = define_op("bitmask_unpack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
