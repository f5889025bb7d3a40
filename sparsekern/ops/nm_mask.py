"""`nm_mask`: select N of every M consecutive weights."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_no_nan, check_tensor
from ..pattern import NM, parse_pattern
from ._registry import define_op, sample
from .topk_mask import keep_largest

SCHEMA = "(Tensor scores, int n, int m) -> Tensor"


def nm_mask(scores: torch.Tensor, pattern: str | NM = "2:4") -> torch.Tensor:
    """Select the N largest scores of every M consecutive columns of a row.

    Of equal scores the lower column is kept; `-0.0` equals `0.0`, and infinities are ordered as numbers.

    Args:
        scores: `[out_features, in_features]` float32, bfloat16 or float16, any strides; larger scores are kept.
        pattern: `"N:M"` keeps N of every M columns, M at most 64.

    Returns:
        `[out_features, in_features]` bool, True where kept: exactly N in every group.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape; a pattern that is not N:M; `in_features` not divisible by M; a NaN.
    """
    check_tensor("scores", scores, ndim=2, dtypes=HALF_OR_FLOAT)
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM):
        raise ValueError(f"pattern: expected 'N:M', got '{parsed}'; topk_mask selects without structure")
    parsed.check_features(scores.shape[1], name="scores")
    return _op(scores, parsed.n, parsed.m)


def reference(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    check_no_nan("scores", scores)
    return keep_largest(scores.reshape(-1, m), n).view(scores.shape)


def _fake(scores, n, m):
    torch._check(scores.dim() == 2 and scores.shape[1] % m == 0)
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _samples(generator: torch.Generator):
    for rows, columns, dtype in ((5, 48, torch.float32), (33, 144, torch.bfloat16), (16, 96, torch.float16)):
        scores = torch.randn(rows, columns, generator=generator).to(dtype)
        yield sample(scores, 2, 4)
        yield sample(scores.T.contiguous().T, 4, 8)
        yield sample(scores.round(), 1, 16)  # rounded: full of ties and of both zeros
        yield sample(scores.round(), 5, 6)
        yield sample(scores.round(), 7, 12)


_op = define_op("nm_mask", SCHEMA, reference=reference, fake=_fake, samples=_samples, friendly={"pattern": ("n", "m")})
