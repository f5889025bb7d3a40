"""`nm_experts_linear`: each row of `x` times the packed N:M weights of its experts, without unpacking."""

from __future__ import annotations

import torch

from .._checks import check_tensor
from ..layouts.packed_rows import code_bits, pack_nm_rows, stored_per_row, unpack_nm_rows
from ._experts import check_bias, check_choice, check_ids, gradients_of_experts, reference_product
from ._registry import define_op, sample
from .bitmask_experts_linear import random_choice
from .nm_linear import check_pattern, sparse_weight

SCHEMA = "(Tensor x, Tensor experts, Tensor values, Tensor codes, int n, int m, Tensor? bias=None) -> Tensor"


def nm_experts_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    n: int,
    m: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply each row of `x` by the packed N:M weights of the experts that are named for it.

    Rows are grouped by expert, and only the experts that are named are read. With a dense `weight` of `[experts, out_features,
    in_features]`, the result is `F.linear(x[i], weight[experts[i, j]], bias[experts[i, j]])` at `[i, j]`.

    Products are summed in float32, and NaN and Inf propagate as in `nm_linear`. On a CUDA device the rows are grouped there, and
    the host does not wait: only the first ids for these tensors are checked. Later, an id of no expert gives NaN.

    Args:
        x: `[tokens, in_features]` float32, bfloat16 or float16, any strides; features divisible by `m`.
        experts: `[tokens, choices]` int64, the ids of the experts of each row.
        values: `[experts, out_features, stored]` of the dtype of `x`: for each expert those of `nm_pack`.
        codes: `[experts, out_features, stored * bits / 32]` int32.
        n: kept values of a group.
        m: columns of a group, at most 16.
        bias: `[experts, out_features]` of the dtype of `x`, or None.

    Returns:
        `[tokens, choices, out_features]` of the dtype of `x`.

    Raises:
        TypeError: a wrong dtype; `n` or `m` is not a whole number.
        ValueError: wrong shapes or devices; a pattern without a layout; an id of no expert.
    """
    check_choice(x, experts)
    check_pattern(n, m)
    if x.shape[-1] % m:
        raise ValueError(f"x: expected features divisible by m = {m}, got {x.shape[-1]}")
    stored = stored_per_row(x.shape[-1], n, m, x.dtype)
    check_tensor("values", values, ndim=3, dtypes=(x.dtype,), shape=(None, None, stored), device=x.device)
    count, rows = values.shape[:2]
    code_shape = (count, rows, stored * code_bits(m) // 32)
    check_tensor("codes", codes, ndim=3, dtypes=(torch.int32,), shape=code_shape, device=x.device)
    check_bias(bias, count, rows, x)
    return _op(x, experts, values, codes, n, m, bias)


def reference(x, experts, values, codes, n, m, bias=None) -> torch.Tensor:
    check_ids(experts, len(values))
    columns = x.shape[1]
    return reference_product(
        x, experts, values.shape[1], lambda expert: unpack_nm_rows(values[expert], codes[expert], n, m, columns), bias
    )


def _fake(x, experts, values, codes, n, m, bias=None):
    torch._check(x.dim() == 2 and experts.dim() == 2 and values.dim() == 3)
    return x.new_empty((*experts.shape, values.shape[1]))


def _samples(generator: torch.Generator):
    for count, rows, columns, n, m, dtype, tokens, choices in (
        (3, 5, 24, 2, 4, torch.float32, 4, 2),
        (4, 33, 72, 2, 4, torch.bfloat16, 1, 3),
        (2, 7, 80, 3, 8, torch.bfloat16, 40, 2),
        (2, 18, 66, 1, 3, torch.float16, 7, 1),
    ):
        packed = [pack_nm_rows(sparse_weight(rows, columns, n, m, dtype, generator), n, m) for _ in range(count)]
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        chosen = random_choice(tokens, choices, count, generator)
        bias = torch.randn(count, rows, generator=generator).to(dtype)
        tensors = (torch.stack([own[name] for own in packed]) for name in ("values", "codes"))
        yield sample(x, chosen, *tensors, n, m, *([bias] if choices == 2 else []))


def _unpack(given, expert: int, in_features: int) -> torch.Tensor:
    values, codes = given["values"][expert], given["codes"][expert]
    return torch.ops.sparsekern.nm_unpack(values, codes, given["n"], given["m"], in_features)


_GRADIENTS = gradients_of_experts(("values", "codes"), _unpack)
_op = define_op("nm_experts_linear", SCHEMA, reference=reference, fake=_fake, samples=_samples, gradients=_GRADIENTS)
