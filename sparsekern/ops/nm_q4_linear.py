"""`nm_q4_linear`: `x W^T + b` from an N:M weight with 4-bit values, without unpacking."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .._checks import HALF_OR_FLOAT, check_tensor, check_whole
from ..layouts.nm_q4 import PATTERNS, Q4Layout, pack_q4, quantize_activations, unpack_q4
from ._registry import define_op, sample
from ._torch_op import gradients_of_product
from .nm_linear import sparse_weight

SCHEMA = "(Tensor x, Tensor blocks, int n, int m, int out_features, Tensor? bias=None) -> Tensor"


def nm_q4_linear(
    x: torch.Tensor, blocks: torch.Tensor, n: int, m: int, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a packed N:M weight with 4-bit values: `nm_q4_linear(x, nm_q4_pack(w, scales, n, m), n, m, len(w))` is about `x @ w.T`.

    `x` is rounded to 8 bits: for each token and 64 columns, to multiples of their largest magnitude divided by 127. Of a token's
    result, only the order in which float32 sums are added depends on how many tokens a call has. A NaN or Inf of `x` makes the
    token's outputs NaN. The gradient of `x` is that of the product without rounding.

    The kernels only ensure that they stay inside the packed tensor. `nm_q4_unpack`, and loading a packed model, check the contents.

    Args:
        x: `[..., in_features]` float32, bfloat16 or float16, any strides; features divisible by `m`.
        blocks: `[strips, ceil(in_features / 64), bytes]` uint8, from `nm_q4_pack`; `sparsekern.layouts.nm_q4` describes the layout.
        n: kept values of a group.
        m: columns of a group. The patterns are 2:4, 1:4 and 4:16.
        out_features: rows of the weight.
        bias: `[out_features]` of the dtype of `x`, or None.

    Returns:
        `[..., out_features]` of the dtype of `x`.

    Raises:
        TypeError: a wrong dtype; `n`, `m` or `out_features` is not a whole number.
        ValueError: wrong shapes or devices; a pattern without a layout.
    """
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise ValueError(
            f"x: expected [..., in_features], got {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}"
        )
    check_tensor("x", x, ndim=x.dim(), dtypes=HALF_OR_FLOAT)
    check_q4_pattern(n, m)
    check_whole("out_features", out_features, 0)
    if x.shape[-1] % m:
        raise ValueError(f"x: expected features divisible by m = {m}, got {x.shape[-1]}")
    shape = Q4Layout(n, m).shape(out_features, x.shape[-1])
    check_tensor("blocks", blocks, ndim=3, dtypes=(torch.uint8,), shape=shape, device=x.device)
    if bias is not None:
        check_tensor("bias", bias, ndim=1, dtypes=(x.dtype,), shape=(out_features,), device=x.device)
    return _op(x, blocks, n, m, out_features, bias)


def check_q4_pattern(n: int, m: int) -> None:
    """Raise `TypeError` or `ValueError` unless N:M weights have a layout with 4-bit values."""
    check_whole("n", n, 1)
    check_whole("m", m, 2)
    if (n, m) not in PATTERNS:
        raise ValueError(f"n, m: expected 2:4, 1:4 or 4:16, which have a layout with 4-bit values, got {n}:{m}")


def reference(x, blocks, n, m, out_features, bias=None) -> torch.Tensor:
    weight, _ = unpack_q4(blocks, n, m, out_features, x.shape[-1])
    return linear(quantize_activations(x), weight, None if bias is None else bias.float()).to(x.dtype)


def _fake(x, blocks, n, m, out_features, bias=None):
    torch._check(x.dim() > 0 and blocks.dim() == 3)
    return x.new_empty((*x.shape[:-1], out_features))


def random_scales(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return scales with which random weights of that shape use all codes."""
    shape = Q4Layout(2, 4).shape(rows, columns)
    return ((torch.rand(rows, shape[1], generator=generator) + 0.5) / 4).half()


def _samples(generator: torch.Generator):
    for rows, columns, n, m, dtype, tokens in (
        (5, 24, 2, 4, torch.float32, (1,)),
        (33, 136, 2, 4, torch.bfloat16, (2, 3)),
        (40, 128, 1, 4, torch.float16, (7,)),
        (18, 336, 4, 16, torch.bfloat16, (40,)),
    ):
        weight = sparse_weight(rows, columns, n, m, torch.float32, generator)
        blocks = pack_q4(weight, random_scales(rows, columns, generator), n, m)
        x = torch.randn(*tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        yield sample(x, blocks, n, m, rows, *([bias] if len(tokens) == 2 else []))


def _unpack(given, in_features: int) -> torch.Tensor:
    weight, _ = torch.ops.sparsekern.nm_q4_unpack(given["blocks"], given["n"], given["m"], given["out_features"], in_features)
    return weight


_GRADIENTS = gradients_of_product(("blocks",), _unpack)
_op = define_op("nm_q4_linear", SCHEMA, reference=reference, fake=_fake, samples=_samples, gradients=_GRADIENTS)
