"""`bitmask_experts_linear`: each row of `x` times the packed weights of its experts, without unpacking."""

from __future__ import annotations

import torch

from .._checks import check_tensor
from ..layouts.packed_experts import bitmask_rows_of, join_bitmask_experts
from ..layouts.packed_rows import SLACK, lanes, pack_bitmask_rows, tiles, unpack_bitmask_rows, words
from ._experts import check_bias, check_choice, check_ids, gradients_of_experts, reference_product
from ._registry import define_op, sample
from .bitmask_linear import check_places, sparse_weight

SCHEMA = "(Tensor x, Tensor experts, Tensor values, Tensor bitmask, Tensor starts, Tensor order, Tensor? bias=None) -> Tensor"  # fmt: skip


def bitmask_experts_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply each row of `x` by the packed weights of the experts that are named for it.

    Rows are grouped by expert, and only the experts that are named are read. With a dense `weight` of `[experts, out_features,
    in_features]`, the result is `F.linear(x[i], weight[experts[i, j]], bias[experts[i, j]])` at `[i, j]`.

    Products are summed in float32, and NaN and Inf propagate as in `bitmask_linear`. On a CUDA device the rows are grouped there, and
    the host does not wait: only the first product with these tensors is checked. Later, an id of no expert gives NaN.

    Args:
        x: `[tokens, in_features]` float32, bfloat16 or float16, any strides.
        experts: `[tokens, choices]` int64, the ids of the experts of each row.
        values: `[stored]` of the dtype of `x`, in the layout of `sparsekern.layouts.packed_experts`.
        bitmask: `[experts, out_features, ceil(in_features / 64)]` int64.
        starts: `[experts, ceil(out_features / 16) + 1]` int64.
        order: `[experts, out_features]` int32.
        bias: `[experts, out_features]` of the dtype of `x`, or None.

    Returns:
        `[tokens, choices, out_features]` of the dtype of `x`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices; an id of no expert; starts, order or bits that lead outside the other tensors.
    """
    check_choice(x, experts)
    check_tensor("values", values, ndim=1, dtypes=(x.dtype,), device=x.device)
    check_tensor("order", order, ndim=2, dtypes=(torch.int32,), device=x.device)
    count, rows = order.shape
    check_tensor("bitmask", bitmask, ndim=3, dtypes=(torch.int64,), shape=(count, rows, words(x.shape[-1])), device=x.device)
    check_tensor("starts", starts, ndim=2, dtypes=(torch.int64,), shape=(count, tiles(rows) + 1), device=x.device)
    if values.shape[0] % lanes(x.dtype) or values.shape[0] < SLACK * lanes(x.dtype):
        raise ValueError(f"values: expected a whole number of slots, {SLACK} of them spare, got {values.shape[0]} values")
    check_bias(bias, count, rows, x)
    return _op(x, experts, values, bitmask, starts, order, bias)


def reference(x, experts, values, bitmask, starts, order, bias=None) -> torch.Tensor:
    check_ids(experts, len(order))

    def weight_of(expert: int) -> torch.Tensor:
        check_places(values, bitmask[expert], starts[expert], order[expert])
        own = bitmask_rows_of(values, bitmask, starts, order, expert)
        return unpack_bitmask_rows(own["values"], own["bitmask"], own["order"], x.shape[1])

    return reference_product(x, experts, order.shape[1], weight_of, bias)


def _fake(x, experts, values, bitmask, starts, order, bias=None):
    torch._check(x.dim() == 2 and experts.dim() == 2 and order.dim() == 2)
    return x.new_empty((*experts.shape, order.shape[1]))


def random_choice(tokens: int, choices: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return different experts for each token."""
    return torch.rand(tokens, count, generator=generator).argsort(1)[:, :choices].contiguous()


def _samples(generator: torch.Generator):
    for count, rows, columns, dtype, tokens, choices in (
        (3, 5, 24, torch.float32, 4, 2),
        (4, 33, 71, torch.bfloat16, 1, 3),
        (2, 18, 130, torch.float16, 7, 1),
        (2, 18, 70, torch.bfloat16, 40, 2),
    ):
        packed = [pack_bitmask_rows(sparse_weight(rows, columns, dtype, generator)) for _ in range(count)]
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        chosen = random_choice(tokens, choices, count, generator)
        bias = torch.randn(count, rows, generator=generator).to(dtype)
        tensors = join_bitmask_experts(packed, (rows, columns), dtype).values()
        yield sample(x, chosen, *tensors, *([bias] if choices == 2 else []))


def _unpack(given, expert: int, in_features: int) -> torch.Tensor:
    own = bitmask_rows_of(given["values"], given["bitmask"], given["starts"], given["order"], expert)
    return torch.ops.sparsekern.bitmask_unpack(own["values"], own["bitmask"], own["starts"], own["order"], in_features)


_GRADIENTS = gradients_of_experts(("values", "bitmask", "starts", "order"), _unpack)
_op = define_op("bitmask_experts_linear", SCHEMA, reference=reference, fake=_fake, samples=_samples, gradients=_GRADIENTS)
