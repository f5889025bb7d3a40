"""`semi_structured_pack`: a 2:4 weight as values and metadata, in the layout of PyTorch's semi-structured tensors."""

from __future__ import annotations

import torch

from .._checks import check_no_nan, check_tensor
from ..layouts.semi_structured import FORMATS, encode, word_offsets
from ._registry import define_op, sample

SCHEMA = "(Tensor weight) -> (Tensor values, Tensor meta)"


def semi_structured_pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a weight that is 2:4 sparse along its columns into half the values plus 2 bits of metadata per value.

    For every 2:4 weight, values and metadata are bit-identical to
    `torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass`, so that PyTorch's CUTLASS kernels can read
    them. `-0.0` counts as zero. A group with fewer than two non-zeros also stores some of its zeros unchanged, so that a `-0.0` can
    survive. Non-zeros that do not fit are refused; PyTorch's converter drops them.

    Args:
        weight: `[out_features, in_features]`, any strides. bfloat16 or float16: at most 2 non-zeros in every 4 columns, shape a
            multiple of (32, 32). int8: the same, shape a multiple of (16, 64). float32: at most 1 in every 2 columns, shape a
            multiple of (32, 16).

    Returns:
        `(values, meta)`: `[out_features, in_features / 2]` of the weight's dtype; `[out_features, in_features / 16]` int16
        (int8: `in_features / 32` int32; float32: `in_features / 8` int16).

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape; a NaN; a group with more non-zeros than fit, named by its row and columns.

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021; the permutation is CUTLASS's `reorder_meta`.
    """
    check_tensor("weight", weight, ndim=2, dtypes=tuple(FORMATS))
    check_divides(weight)
    return _op(weight)


def check_divides(weight: torch.Tensor) -> None:
    """Raise `ValueError` unless the layout of the weight's dtype divides its shape."""
    fmt = FORMATS[weight.dtype]
    rows, columns = weight.shape
    if rows % fmt.row_multiple or columns % fmt.column_multiple:
        raise ValueError(
            f"weight: expected a shape that is a multiple of ({fmt.row_multiple}, {fmt.column_multiple}) for "
            f"{str(weight.dtype).removeprefix('torch.')}, got {tuple(weight.shape)}"
        )


def check_fits(weight: torch.Tensor) -> None:
    """Raise `ValueError` naming the first NaN, or the first group with more non-zeros than fit the layout of the weight's dtype."""
    check_no_nan("weight", weight)
    group = FORMATS[weight.dtype].group
    rows, columns = weight.shape
    _check_counts((weight.reshape(rows, columns // group, group) != 0).sum(-1), group)


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_fits(weight)
    fmt = FORMATS[weight.dtype]
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // fmt.group, fmt.group)
    flags = groups != 0
    codes = encode(flags.repeat_interleave(4 // fmt.group, dim=-1))
    index = torch.stack((codes & 3, codes >> 2), dim=-1) if fmt.group == 4 else (codes & 3).unsqueeze(-1) // 2
    values = groups.gather(-1, index).reshape(rows, columns // 2)

    words = columns // (fmt.group * fmt.codes_per_word)
    shifts = 4 * torch.arange(fmt.codes_per_word, device=weight.device)
    word = (codes.view(rows, words, fmt.codes_per_word) << shifts).sum(-1).to(fmt.meta_dtype)
    offsets = word_offsets(rows, words, fmt, weight.device)
    meta = word.new_empty(rows * words).scatter_(0, offsets.view(-1), word.view(-1)).view(rows, words)
    return values, meta


def _check_counts(counts: torch.Tensor, group: int) -> None:
    too_many = (counts > group // 2).nonzero()
    if len(too_many):
        row, index = too_many[0].tolist()
        raise ValueError(
            f"weight: expected at most {group // 2} non-zeros in every {group} columns, got {int(counts[row, index])} "
            f"in row {row}, columns {index * group} to {index * group + group - 1}"
        )


def new_packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty values and metadata for a weight."""
    fmt = FORMATS[weight.dtype]
    rows, columns = weight.shape
    words = columns // (fmt.group * fmt.codes_per_word)
    return weight.new_empty((rows, columns // 2)), weight.new_empty((rows, words), dtype=fmt.meta_dtype)


def _fake(weight):
    torch._check(weight.dim() == 2)
    return new_packed(weight)


def sparse_weight(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return a random weight that fits the layout of `dtype`; some groups have fewer non-zeros than fit."""
    group = FORMATS[dtype].group
    weight = torch.randint(-9, 10, (rows, columns // group, group), generator=generator)
    dropped = torch.rand(weight.shape, generator=generator).argsort(-1)[..., : group // 2]
    return weight.scatter(-1, dropped, 0).view(rows, columns).to(dtype)


def _samples(generator: torch.Generator):
    for dtype, fmt in FORMATS.items():
        weight = sparse_weight(2 * fmt.row_multiple, 3 * fmt.column_multiple, dtype, generator)
        yield sample(weight)
        yield sample(-weight.T.contiguous().T)


_op = define_op("semi_structured_pack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
