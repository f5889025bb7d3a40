"""`int8_linear`: `x W^T + b` from a weight of 8-bit values with a scale for each row."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .._checks import HALF_OR_FLOAT, check_tensor
from ..layouts.int8_rows import quantize_rows, restore_rows
from ._registry import define_op, sample
from ._torch_op import gradients_of_product

SCHEMA = "(Tensor x, Tensor values, Tensor scales, Tensor? bias=None) -> Tensor"


def int8_linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by a weight of 8-bit values: `x @ (scales[:, None] * values).T + bias`.

    `x` is not rounded. Products are added in float32, and the sum is multiplied by the scale. Of a token's result, only the order of sums
    depends on how many tokens a call has.

    Args:
        x: `[..., in_features]` float32, bfloat16 or float16, any strides.
        values: `[out_features, in_features]` int8.
        scales: `[out_features]` float32.
        bias: `[out_features]` of the dtype of `x`, or None.

    Returns:
        `[..., out_features]` of the dtype of `x`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices.
    """
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise ValueError(
            f"x: expected [..., in_features], got {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}"
        )
    check_tensor("x", x, ndim=x.dim(), dtypes=HALF_OR_FLOAT)
    check_tensor("values", values, ndim=2, dtypes=(torch.int8,), device=x.device)
    rows, columns = values.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x: expected {columns} features, the columns of values, got {x.shape[-1]}")
    check_tensor("scales", scales, ndim=1, dtypes=(torch.float32,), shape=(rows,), device=x.device)
    if bias is not None:
        check_tensor("bias", bias, ndim=1, dtypes=(x.dtype,), shape=(rows,), device=x.device)
    return _op(x, values, scales, bias)


def reference(x, values, scales, bias=None) -> torch.Tensor:
    y = linear(x.float(), values.float()) * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _fake(x, values, scales, bias=None):
    torch._check(x.dim() > 0 and values.dim() == 2 and scales.dim() == 1)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _samples(generator: torch.Generator):
    for rows, columns, dtype, tokens in (
        (5, 24, torch.float32, (1,)),
        (33, 131, torch.bfloat16, (2, 3)),
        (40, 64, torch.float16, (7,)),
        (18, 200, torch.bfloat16, (40,)),
    ):
        values, scales = quantize_rows(torch.randn(rows, columns, generator=generator))
        x = torch.randn(*tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        yield sample(x, values, scales, *([bias] if len(tokens) == 2 else []))


def _unpack(given, in_features: int) -> torch.Tensor:
    return restore_rows(given["values"], given["scales"])


_GRADIENTS = gradients_of_product(("values", "scales"), _unpack)
_op = define_op("int8_linear", SCHEMA, reference=reference, fake=_fake, samples=_samples, gradients=_GRADIENTS)
