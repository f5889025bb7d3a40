"""`sensitivity_`: the influence of each weight on a linear layer's output, token by token, accumulated batch by batch."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_row_mask, check_tensor
from ..backends.values import values_are_checked
from ._registry import define_op, sample
from .cross_gram import cross_gram_

SCHEMA = "(Tensor(a!) importance, Tensor weight, Tensor x, *, Tensor? row_mask=None) -> ()"
# Tokens and output rows at a time. On a CPU the outputs of a tile (8 MB in float32) stay in the caches between the two products. On a
# GPU without the Triton kernel `importance` is read and written so rarely that it costs little beside them.
TILES = {"cpu": (2048, 1024), "cuda": (16384, 8192)}


def sensitivity_(
    importance: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Add `|W| * (|Y|^T |X|)` to `importance`, in place, where `Y = X W^T` are the layer's outputs.

    This is the elementwise sum over tokens of `|W * (y x^T)|`: the gradient of `||y||^2 / 2` with respect to the weight, times the weight.
    The identity is exact because `y x^T` has rank one. (The absolute value after the sum over tokens would be `|W * (W G)|` with the Gram
    matrix `G` of `gram_`, which needs no op.) Sums too large for float32 are not an error: they leave Inf in
    `importance`, or NaN if the weight is zero.

    The op makes two matrix products, `4 * tokens * out_features * in_features` operations, one tile of the outputs at a time. On a CPU
    both are PyTorch's own; 16-bit inputs are multiplied exactly, and all sums are float32. From a few hundred features on, the absolute
    values take less than 1 % of the time. On a CUDA device cuBLAS computes the first product, rounded to the dtype of `x` as in the layer
    itself. The second is the Triton kernel of `cross_gram_`, which takes absolute values of the outputs in registers and adds
    `|W| * sum` to `importance`. Only `|x|` is written to memory, in the pass that looks for NaN and Inf. Every run gives the same bits.

    Args:
        importance: `[out_features, in_features]` float32, updated in place.
        weight: `[out_features, in_features]` float32, bfloat16 or float16.
        x: `[tokens, in_features]` of the dtype of `weight`, any strides.
        row_mask: `[tokens]` bool; rows that are False (padding) are skipped. None uses all rows.

    Returns:
        `importance`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device; NaN or Inf in `weight` or in a used row of `x`, and nothing is then changed; an output of
            the layer that overflows, and `importance` is then undefined.

    Source: the importance of Malla, Choi and Choi, COPAL, 2024, as reconstructed in `sparsekern.COPAL`.
    """
    check_tensor("importance", importance, ndim=2, dtypes=(torch.float32,))
    shape, device = tuple(importance.shape), importance.device
    check_tensor("weight", weight, ndim=2, dtypes=HALF_OR_FLOAT, shape=shape, device=device)
    check_tensor("x", x, ndim=2, dtypes=(weight.dtype,), shape=(None, shape[1]), device=device)
    check_row_mask(row_mask, x)
    _op(importance, weight, x, row_mask=row_mask)
    return importance


def reference(importance: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, *, row_mask: torch.Tensor | None = None) -> None:
    checked = values_are_checked(x)
    if checked:
        check_finite("weight", weight)
        check_finite("x", x, row_mask)
    device = "cuda" if x.is_cuda else "cpu"
    dtype, (tokens, rows) = x.dtype if x.is_cuda else torch.float32, TILES[device]
    for first in range(0, len(x), tokens):
        inputs = x[first : first + tokens].to(dtype)
        mask = None if row_mask is None else row_mask[first : first + tokens]
        sizes = inputs.abs()
        for row in range(0, len(weight), rows):
            part = weight[row : row + rows].to(dtype)
            outputs = (inputs @ part.T).abs_()
            if checked:
                _check_outputs(outputs, mask, first, row)
            product = torch.zeros_like(part, dtype=torch.float32, memory_format=torch.contiguous_format)
            cross_gram_(product, outputs, sizes, row_mask=mask)
            importance[row : row + rows].addcmul_(part.abs().float(), product)


def _check_outputs(outputs: torch.Tensor, mask: torch.Tensor | None, first: int, row: int) -> None:
    try:
        check_finite("outputs", outputs, mask)
    except ValueError:
        bad = ~outputs.isfinite() if mask is None else ~outputs.isfinite() & mask[:, None]
        token, output = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"x: expected finite outputs, but output {row + output} of row {first + token} overflows {outputs.dtype}"
        ) from None


def _fake(importance, weight, x, *, row_mask=None) -> None:
    torch._check(importance.dim() == weight.dim() == x.dim() == 2 and importance.shape[0] == weight.shape[0])
    torch._check(importance.shape[1] == weight.shape[1] == x.shape[1])


def _samples(generator: torch.Generator):
    for tokens, rows, features, dtype in ((37, 24, 70, torch.float32), (64, 33, 8, torch.bfloat16), (5, 70, 33, torch.float16)):
        weight = torch.randn(rows, features, generator=generator).to(dtype)
        x = torch.randn(tokens, features, generator=generator).to(dtype)
        yield sample(torch.zeros(rows, features), weight, x)
        yield sample(torch.ones(rows, features), weight, x.T.contiguous().T, row_mask=torch.arange(tokens) % 3 > 0)


_op = define_op("sensitivity_", SCHEMA, reference=reference, fake=_fake, samples=_samples, native=False)
