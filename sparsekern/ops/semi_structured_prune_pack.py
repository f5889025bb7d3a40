"""`semi_structured_prune_pack`: select, zero and pack a weight to 2:4 in one pass."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_no_nan, check_tensor
from ..layouts.semi_structured import FORMATS
from ._registry import define_op, sample
from .nm_mask import reference as mask_of
from .semi_structured_pack import check_divides, new_packed
from .semi_structured_pack import reference as pack

SCHEMA = "(Tensor weight, Tensor? scores=None) -> (Tensor values, Tensor meta)"


def semi_structured_prune_pack(weight: torch.Tensor, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a weight to 2 of every 4 columns (float32: 1 of every 2) and pack it like `semi_structured_pack`.

    The result is bit-identical to `nm_mask`, zeroing the pruned weights, and `semi_structured_pack`, but the pruned weight is never
    written to memory. `semi_structured_unpack` restores it.

    Args:
        weight: `[out_features, in_features]` bfloat16, float16 (shape a multiple of (32, 32)) or float32 (of (32, 16)), any
            strides.
        scores: `[out_features, in_features]` float32, bfloat16 or float16, any strides; larger scores are kept, and of equal
            ones the lower column. None ranks by the magnitudes of the weight.

    Returns:
        `(values, meta)` as `semi_structured_pack` returns them.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device; a NaN in `weight` or `scores`.
    """
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT)
    check_divides(weight)
    if scores is not None:
        check_tensor("scores", scores, ndim=2, dtypes=HALF_OR_FLOAT, shape=weight.shape, device=weight.device)
    return _op(weight, scores)


def reference(weight: torch.Tensor, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    check_no_nan("weight", weight)
    group = FORMATS[weight.dtype].group
    mask = mask_of(weight.abs() if scores is None else scores, group // 2, group)
    return pack(weight.masked_fill(~mask, 0))


def _fake(weight, scores=None):
    torch._check(weight.dim() == 2)
    return new_packed(weight)


def _samples(generator: torch.Generator):
    for dtype in HALF_OR_FLOAT:
        fmt = FORMATS[dtype]
        rows, columns = 2 * fmt.row_multiple, 3 * fmt.column_multiple
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        yield sample(weight)
        yield sample(weight.round().T.contiguous().T)  # rounded: full of ties and of both zeros
        for scores_dtype in HALF_OR_FLOAT:
            scores = torch.randn(rows, columns, generator=generator).to(scores_dtype)
            yield sample(weight.round(), scores)
        yield sample(weight, scores=scores.round().T.contiguous().T)


_op = define_op("semi_structured_prune_pack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
