"""Which weights stay, given a score each: the one place where a pattern becomes a mask for the methods that only choose."""

from __future__ import annotations

import torch

from .. import ops
from ..pattern import NM, Pattern, pruned_count


def keep_mask(scores: torch.Tensor, pattern: Pattern, scope: str) -> torch.Tensor:
    """The mask (True where kept) of the highest `scores` `[out_features, in_features]`.

    N:M keeps N of each M consecutive inputs. A sparsity prunes exactly `floor(sparsity * count)`, counted over each row
    (`scope="row"`) or over the whole matrix (`scope="matrix"`). Of equal scores the lower index is kept.
    """
    if isinstance(pattern, NM):
        return ops.nm_mask(scores, pattern)
    total = scores.shape[1] if scope == "row" else scores.numel()
    return ops.topk_mask(scores, total - pruned_count(total, pattern.sparsity), scope=scope)
