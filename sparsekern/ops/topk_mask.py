"""`topk_mask`: select k weights of each row, or of the whole matrix."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_no_nan, check_tensor, check_whole
from ._registry import define_op, sample

SCHEMA = '(Tensor scores, int k, *, str scope="row") -> Tensor'
SCOPES = ("row", "matrix")


def topk_mask(scores: torch.Tensor, k: int, *, scope: str = "row") -> torch.Tensor:
    """Select exactly the `k` largest scores of each row, or of the whole matrix, without sorting.

    Of equal scores the one with the lower (row-major) index is kept, so that the result does not depend on the number of threads.
    `-0.0` equals `0.0`, and infinities are ordered as numbers.

    Args:
        scores: `[out_features, in_features]` float32, bfloat16 or float16, any strides; larger scores are kept.
        k: number of scores to keep, in each row or in the whole matrix.
        scope: `"row"` or `"matrix"`.

    Returns:
        `[out_features, in_features]` bool, True where kept.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape; an unknown scope; `k` below 0 or above the number of scores; a NaN.

    Source: the comparison groups of Sun et al., Wanda, 2023, section 3 (row), and of magnitude pruning (matrix).
    """
    check_tensor("scores", scores, ndim=2, dtypes=HALF_OR_FLOAT)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    check_whole("k", k)
    available = scores.shape[1] if scope == "row" else scores.numel()
    if not 0 <= k <= available:
        raise ValueError(f"k: expected 0 to {available} for scope '{scope}' of scores {tuple(scores.shape)}, got {k}")
    return _op(scores, k, scope=scope)


def reference(scores: torch.Tensor, k: int, *, scope: str = "row") -> torch.Tensor:
    check_no_nan("scores", scores)
    rows = scores.reshape(1, -1) if scope == "matrix" else scores
    return keep_largest(rows, k).view(scores.shape)


def keep_largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return a mask of the `k` largest scores of each row; of equal ones the lower column is kept."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)


def _fake(scores, k, *, scope="row"):
    torch._check(scores.dim() == 2)
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _samples(generator: torch.Generator):
    for rows, columns, dtype in ((5, 24, torch.float32), (33, 71, torch.bfloat16), (1, 513, torch.float16)):
        scores = torch.randn(rows, columns, generator=generator).to(dtype)
        for scope, available in (("row", columns), ("matrix", rows * columns)):
            yield sample(scores, available // 2, scope=scope)
            yield sample((4 * scores).round().T.contiguous().T, available // 3, scope=scope)  # full of ties and of both zeros
        yield sample(scores, 0)
        yield sample(scores, columns)


_op = define_op("topk_mask", SCHEMA, reference=reference, fake=_fake, samples=_samples)
