"""`nm_linear`: `x W^T + b` from the kept values of an N:M weight and their positions, without unpacking."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .._checks import HALF_OR_FLOAT, check_tensor, check_whole
from ..layouts.packed_rows import MOST_M, code_bits, pack_nm_rows, stored_per_row, unpack_nm_rows
from ._registry import define_op, sample
from ._torch_op import gradients_of_product

SCHEMA = "(Tensor x, Tensor values, Tensor codes, int n, int m, Tensor? bias=None) -> Tensor"


def nm_linear(
    x: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, n: int, m: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a packed N:M weight: `nm_linear(x, **nm_pack(weight, n, m), n=n, m=m)` is `F.linear(x, weight)`.

    Products are summed in float32. NaN and Inf propagate through stored weights as in the dense product. The product of a zero weight
    with an Inf or NaN of `x` (NaN in the dense product) is unspecified.

    The kernels only ensure that they stay inside the packed tensors. `nm_unpack`, and loading a packed model, check the contents.

    Args:
        x: `[..., in_features]` float32, bfloat16 or float16, any strides; features divisible by `m`.
        values: `[out_features, stored]` of the dtype of `x`, from `nm_pack`.
        codes: `[out_features, stored * bits / 32]` int32, from `nm_pack`; 2 bits per position for `m` up to 4, otherwise 4.
        n: kept values of a group.
        m: columns of a group, at most 16.
        bias: `[out_features]` of the dtype of `x`, or None.

    Returns:
        `[..., out_features]` of the dtype of `x`.

    Raises:
        TypeError: a wrong dtype; `n` or `m` is not a whole number.
        ValueError: wrong shapes or devices; a pattern without a layout.
    """
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise ValueError(
            f"x: expected [..., in_features], got {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}"
        )
    check_tensor("x", x, ndim=x.dim(), dtypes=HALF_OR_FLOAT)
    check_pattern(n, m)
    if x.shape[-1] % m:
        raise ValueError(f"x: expected features divisible by m = {m}, got {x.shape[-1]}")
    stored = stored_per_row(x.shape[-1], n, m, x.dtype)
    check_tensor("values", values, ndim=2, dtypes=(x.dtype,), shape=(None, stored), device=x.device)
    code_shape = (values.shape[0], stored * code_bits(m) // 32)
    check_tensor("codes", codes, ndim=2, dtypes=(torch.int32,), shape=code_shape, device=x.device)
    if bias is not None:
        check_tensor("bias", bias, ndim=1, dtypes=(x.dtype,), shape=(values.shape[0],), device=x.device)
    return _op(x, values, codes, n, m, bias)


def check_pattern(n: int, m: int) -> None:
    """Raise `TypeError` or `ValueError` unless N:M weights have a layout."""
    check_whole("n", n, 1)
    check_whole("m", m, 2)
    if not n < m <= MOST_M:
        raise ValueError(f"n, m: expected n < m <= {MOST_M} (a bitmask packs any other weight), got {n}:{m}")


def reference(x, values, codes, n, m, bias=None) -> torch.Tensor:
    weight = unpack_nm_rows(values, codes, n, m, x.shape[-1])
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _fake(x, values, codes, n, m, bias=None):
    torch._check(x.dim() > 0 and values.dim() == 2)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def sparse_weight(rows: int, columns: int, n: int, m: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return a random weight with N non-zeros in every M columns."""
    dense = torch.randn(rows, columns // m, m, generator=generator)
    kept = torch.rand(dense.shape, generator=generator).argsort(-1).argsort(-1) < n
    return (dense * kept).flatten(1).to(dtype)


def _samples(generator: torch.Generator):
    for rows, columns, n, m, dtype, tokens in (
        (5, 24, 2, 4, torch.float32, (1,)),
        (33, 136, 2, 4, torch.bfloat16, (2, 3)),
        (7, 80, 3, 8, torch.bfloat16, (40,)),
        (18, 330, 1, 3, torch.float16, (3,)),
        (20, 384, 2, 4, torch.bfloat16, (9,)),
        (20, 256, 1, 4, torch.bfloat16, (2,)),
    ):
        packed = tuple(pack_nm_rows(sparse_weight(rows, columns, n, m, dtype, generator), n, m).values())
        x = torch.randn(*tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        yield sample(x, *packed, n, m, *([bias] if len(tokens) == 2 else []))


def _unpack(given, in_features: int) -> torch.Tensor:
    return torch.ops.sparsekern.nm_unpack(given["values"], given["codes"], given["n"], given["m"], in_features)


_GRADIENTS = gradients_of_product(("values", "codes"), _unpack)
_op = define_op("nm_linear", SCHEMA, reference=reference, fake=_fake, samples=_samples, gradients=_GRADIENTS)
