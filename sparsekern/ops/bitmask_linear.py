"""`bitmask_linear`: `x W^T + b` from the non-zeros of `W` and one bit per weight, without unpacking."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .._checks import HALF_OR_FLOAT, check_tensor
from ..layouts.packed_rows import SLACK, lanes, pack_bitmask_rows, slot_counts, tiles, unpack_bitmask_rows, words, words_to_bits
from ._registry import define_op, sample
from ._torch_op import gradients_of_product

SCHEMA = "(Tensor x, Tensor values, Tensor bitmask, Tensor starts, Tensor order, Tensor? bias=None) -> Tensor"


def bitmask_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a packed weight of any sparsity: `bitmask_linear(x, **bitmask_pack(weight))` is `F.linear(x, weight)`.

    Products are summed in float32. NaN and Inf propagate through non-zero weights as in the dense product. The product of a zero
    weight with an Inf or NaN of `x` (NaN in the dense product) is unspecified.

    The kernels only ensure that they stay inside the packed tensors. `bitmask_unpack`, and loading a packed model, check the contents.

    Args:
        x: `[..., in_features]` float32, bfloat16 or float16, any strides.
        values: `[stored]` of the dtype of `x`, from `bitmask_pack`.
        bitmask: `[out_features, ceil(in_features / 64)]` int64, from `bitmask_pack`.
        starts: `[ceil(out_features / 16) + 1]` int64, from `bitmask_pack`.
        order: `[out_features]` int32, from `bitmask_pack`.
        bias: `[out_features]` of the dtype of `x`, or None.

    Returns:
        `[..., out_features]` of the dtype of `x`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices; starts, order or bits that lead outside the other tensors.
    """
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise ValueError(
            f"x: expected [..., in_features], got {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}"
        )
    check_tensor("x", x, ndim=x.dim(), dtypes=HALF_OR_FLOAT)
    check_tensor("values", values, ndim=1, dtypes=(x.dtype,), device=x.device)
    check_tensor("order", order, ndim=1, dtypes=(torch.int32,), device=x.device)
    rows = order.shape[0]
    check_tensor("bitmask", bitmask, ndim=2, dtypes=(torch.int64,), shape=(rows, words(x.shape[-1])), device=x.device)
    check_tensor("starts", starts, ndim=1, dtypes=(torch.int64,), shape=(tiles(rows) + 1,), device=x.device)
    if values.shape[0] % lanes(x.dtype) or values.shape[0] < SLACK * lanes(x.dtype):
        raise ValueError(f"values: expected a whole number of slots, {SLACK} of them spare, got {values.shape[0]} values")
    if bias is not None:
        check_tensor("bias", bias, ndim=1, dtypes=(x.dtype,), shape=(rows,), device=x.device)
    return _op(x, values, bitmask, starts, order, bias)


def check_places(values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor) -> None:
    """Raise `ValueError` if the packed tensors would lead a kernel outside them; `bitmask_unpack` checks more."""
    rows, slots = len(order), len(values) // lanes(values.dtype) - SLACK
    wrong = (torch.cat((starts.new_zeros(1), starts)).diff() < 0) | (starts > slots)
    if wrong.any():
        raise ValueError(f"starts: expected ascending offsets of at most {slots} slots, got {int(starts[wrong][0])}")
    outside = (order < 0) | (order >= rows)
    if outside.any():
        raise ValueError(f"order: expected rows from 0 to {rows - 1}, got {int(order[outside][0])}")
    if slot_counts(words_to_bits(bitmask).sum(1), values.dtype).sum() > slots:
        raise ValueError("bitmask: expected no more set bits than there are values")


def reference(x, values, bitmask, starts, order, bias=None) -> torch.Tensor:
    check_places(values, bitmask, starts, order)
    weight = unpack_bitmask_rows(values, bitmask, order, x.shape[-1])
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _fake(x, values, bitmask, starts, order, bias=None):
    torch._check(x.dim() > 0 and order.dim() == 1)
    return x.new_empty((*x.shape[:-1], order.shape[0]))


def sparse_weight(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return a random weight, about half of it zero."""
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) > 0.5)).to(dtype)


def _samples(generator: torch.Generator):
    for rows, columns, dtype, tokens in (
        (5, 24, torch.float32, (1,)),
        (33, 71, torch.bfloat16, (2, 3)),
        (18, 330, torch.float16, (3,)),
        (18, 330, torch.bfloat16, (40,)),
    ):
        packed = tuple(pack_bitmask_rows(sparse_weight(rows, columns, dtype, generator)).values())
        x = torch.randn(*tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        yield sample(x, *packed, *([bias] if len(tokens) == 2 else []))


def _unpack(given, in_features: int) -> torch.Tensor:
    return torch.ops.sparsekern.bitmask_unpack(given["values"], given["bitmask"], given["starts"], given["order"], in_features)


_GRADIENTS = gradients_of_product(("values", "bitmask", "starts", "order"), _unpack)
_op = define_op("bitmask_linear", SCHEMA, reference=reference, fake=_fake, samples=_samples, gradients=_GRADIENTS)
