"""`bitmask_pack`: pack a weight of any sparsity for `bitmask_linear`."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_tensor
from ..layouts.packed_rows import SLACK, lanes, pack_bitmask_rows, tiles, words
from ._registry import define_op, sample
from .bitmask_linear import sparse_weight

SCHEMA = "(Tensor weight) -> (Tensor values, Tensor bitmask, Tensor starts, Tensor order)"


def bitmask_pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack a weight into its non-zeros and one bit per weight: `bitmask_linear(x, **bitmask_pack(weight))` multiplies by it.

    Packed models store these tensors. `sparsekern.layouts.packed_rows` describes the layout.

    Args:
        weight: `[out_features, in_features]` float32, bfloat16 or float16, any strides. `-0.0` counts as zero; a NaN is kept.

    Returns:
        The packed tensors by name, contiguous and on the device of `weight`. `values`: `[stored]` of the dtype of `weight`.
        `bitmask`: `[out_features, ceil(in_features / 64)]` int64. `starts`: `[ceil(out_features / 16) + 1]` int64. `order`:
        `[out_features]` int32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a weight that is not 2-D.
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    values, bitmask, starts, order = _op(weight)
    return {"values": values, "bitmask": bitmask, "starts": starts, "order": order}


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = pack_bitmask_rows(weight)
    return packed["values"], packed["bitmask"], packed["starts"], packed["order"]


def _fake(weight):
    torch._check(weight.dim() == 2)
    rows, columns = weight.shape
    slots = torch.library.get_ctx().new_dynamic_size(min=SLACK)
    return (
        weight.new_empty(slots * lanes(weight.dtype)),
        weight.new_empty((rows, words(columns)), dtype=torch.int64),
        weight.new_empty(tiles(rows) + 1, dtype=torch.int64),
        weight.new_empty(rows, dtype=torch.int32),
    )


def _samples(generator: torch.Generator):
    for rows, columns, dtype in (
        (5, 24, torch.float32),
        (33, 71, torch.bfloat16),
        (18, 330, torch.float16),
        (70, 1024, torch.bfloat16),
    ):
        weight = sparse_weight(rows, columns, dtype, generator)
        yield sample(weight)
        yield sample(-weight.T.contiguous().T)


_op = define_op("bitmask_pack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
