"""`admm_step_`: one step of the alternating directions method on a sparse weight, without its least-squares half."""

from __future__ import annotations

import math

import torch

from .._checks import check_tensor
from ..pattern import NM, Pattern, parse_pattern, pruned_count
from ._registry import define_op, sample
from .topk_mask import SCOPES, keep_largest

SCHEMA = (
    "(Tensor(a!) offset, Tensor(b!) dual, Tensor(c!) mask, Tensor weight, *, int n=0, int m=0, int k=0, "
    'str scope="matrix") -> Tensor'
)


def admm_step_(
    offset: torch.Tensor,
    dual: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    pattern: str | float | Pattern,
    *,
    scope: str = "matrix",
) -> torch.Tensor:
    """Update projection, dual and next target of the alternating directions method of multipliers, in place.

    The method looks for a sparse `D` close to `weight` in a quadratic objective. It alternates two steps. A least-squares step finds a
    dense `B` with a small objective and close to `D - dual`. This step finds the sparse `D` closest to `B + dual`:

        z = weight + offset + dual                  # B = weight + offset
        D = z where kept, else 0                    # kept: the largest |z| that the pattern allows
        dual = z - D                                # scaled by the penalty, as all duals here
        offset = D - dual - weight                  # the next B's target, relative to weight

    Distances with a weight for each feature need no other op: `weight`, `offset` and `dual` are scaled by its square root, and `D` is
    scaled back. `ALPS` does so by the diagonal of the Gram matrix.

    For a penalty `rho` the least-squares step is therefore `offset = rho * offset @ (H + rho I)^-1`. Of equal `|z|` the one with the
    lower (row-major) index is kept.

    For N:M, and for a sparsity by row, the CPU kernel makes one pass over the weights. For a sparsity of the whole matrix it reads the
    scores more often, to find the threshold.

    Args:
        offset: `[out_features, in_features]` float32, any strides: `B - weight` on entry, the next target minus `weight` on return.
        dual: `[out_features, in_features]` float32, any strides; exactly 0 where kept, on return.
        mask: `[out_features, in_features]` bool, any strides: any mask on entry, True where `D` is kept on return.
        weight: `[out_features, in_features]` float32, any strides.
        pattern: `"N:M"`, or a sparsity (share of zeros).
        scope: for a sparsity, where the exact number of zeros is counted: `"matrix"` or `"row"`.

    Returns:
        The number of changed entries of `mask`, 0-dim int64.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, pattern or scope; `in_features` not divisible by M; NaN or Inf in `offset`, `dual` or
            `weight`, or in their sum (reported as `dual`). `offset`, `dual` and `mask` are then undefined.

    Source: Meng et al., ALPS, 2024, equations 4 and 6, with the dual scaled by the penalty.
    """
    check_tensor("weight", weight, ndim=2, dtypes=(torch.float32,))
    for name, value, dtype in (("offset", offset, torch.float32), ("dual", dual, torch.float32), ("mask", mask, torch.bool)):
        check_tensor(name, value, ndim=2, dtypes=(dtype,), shape=tuple(weight.shape), device=weight.device)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    pattern = parse_pattern(pattern)
    pattern.check_features(weight.shape[1])
    if isinstance(pattern, NM):
        return _op(offset, dual, mask, weight, n=pattern.n, m=pattern.m)
    total = weight.shape[1] if scope == "row" else weight.numel()
    return _op(offset, dual, mask, weight, k=total - pruned_count(total, pattern.sparsity), scope=scope)


def reference(
    offset: torch.Tensor,
    dual: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    *,
    n: int = 0,
    m: int = 0,
    k: int = 0,
    scope: str = "matrix",
) -> torch.Tensor:
    z = weight + offset + dual
    _check_finite(z, offset, weight)
    if n:
        kept = keep_largest(z.abs().reshape(-1, m), n)
    else:
        kept = keep_largest(z.abs().reshape(1, -1) if scope == "matrix" else z.abs(), k)
    kept = kept.view(z.shape)
    projected = z.masked_fill(~kept, 0)
    changed = (kept != mask).sum()
    dual.copy_(z - projected)
    offset.copy_(projected - dual - weight)
    mask.copy_(kept)
    return changed


def _check_finite(z: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> None:
    bad = ~torch.isfinite(z)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        found = {"offset": float(offset[row, column]), "weight": float(weight[row, column]), "dual": float(z[row, column])}
        name = next(name for name, value in found.items() if not math.isfinite(value))
        raise ValueError(f"{name}: expected finite values, got {found[name]} at [{row}, {column}]")


def _fake(offset, dual, mask, weight, *, n=0, m=0, k=0, scope="matrix"):
    torch._check(weight.dim() == 2 and offset.shape == dual.shape == mask.shape == weight.shape)
    torch._check(n == 0 or weight.shape[1] % m == 0)
    return weight.new_empty((), dtype=torch.int64)


def _samples(generator: torch.Generator):
    for rows, columns in ((5, 48), (33, 144), (3, 4104)):
        offset, dual, weight = (torch.randn(rows, columns, generator=generator) for _ in range(3))
        dual, mask = dual.clamp(max=0), dual > 0
        yield sample(offset, dual, mask, weight, n=2, m=4)
        yield sample(offset.round(), dual.round(), mask, weight.round(), n=5, m=12)  # rounded: full of ties and of both zeros
        for scope, total in (("row", columns), ("matrix", rows * columns)):
            yield sample(offset, dual, mask, weight, k=total // 2, scope=scope)
            yield sample(offset.round(), dual.round(), mask, weight.round(), k=total // 3, scope=scope)
        yield sample(offset, dual, mask, weight, k=0)
        yield sample(offset, dual, mask, weight, k=columns, scope="row")


_op = define_op("admm_step_", SCHEMA, reference=reference, fake=_fake, samples=_samples, friendly={"pattern": ("n", "m", "k")})
