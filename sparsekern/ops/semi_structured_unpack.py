"""`semi_structured_unpack`: unpack a weight that `semi_structured_pack` packed."""

from __future__ import annotations

import torch

from .._checks import check_tensor
from ..layouts.semi_structured import FORMATS, word_offsets
from ._registry import define_op, sample
from .semi_structured_pack import reference as pack
from .semi_structured_pack import sparse_weight

SCHEMA = "(Tensor values, Tensor meta) -> Tensor"


def semi_structured_unpack(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """Unpack values and metadata in the layout of PyTorch's semi-structured tensors into a dense weight; see `semi_structured_pack`.

    Args:
        values: `[out_features, in_features / 2]` bfloat16, float16, float32 or int8.
        meta: `[out_features, in_features / 16]` int16 (int8: `in_features / 32` int32; float32: `in_features / 8` int16).

    Returns:
        `[out_features, in_features]` of the dtype of `values`, `+0.0` where nothing is stored.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device; a metadata code that packing never writes, named by its row and columns.
    """
    check_tensor("values", values, ndim=2, dtypes=tuple(FORMATS))
    fmt = FORMATS[values.dtype]
    rows, columns = values.shape[0], 2 * values.shape[1]
    if rows % fmt.row_multiple or columns % fmt.column_multiple:
        raise ValueError(
            f"values: expected a shape that is a multiple of ({fmt.row_multiple}, {fmt.column_multiple // 2}) for "
            f"{str(values.dtype).removeprefix('torch.')}, got {tuple(values.shape)}"
        )
    words = columns // (fmt.group * fmt.codes_per_word)
    check_tensor("meta", meta, ndim=2, dtypes=(fmt.meta_dtype,), shape=(rows, words), device=values.device)
    return _op(values, meta)


def reference(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    fmt = FORMATS[values.dtype]
    rows, words = meta.shape
    offsets = word_offsets(rows, words, fmt, meta.device)
    word = meta.reshape(-1).gather(0, offsets.view(-1)).view(rows, words, 1)
    shifts = 4 * torch.arange(fmt.codes_per_word, device=meta.device)
    codes = ((word.long() >> shifts) & 15).flatten(1)
    _check_codes(codes, fmt.group)
    index = torch.stack((codes & 3, codes >> 2), dim=-1) if fmt.group == 4 else (codes & 3).unsqueeze(-1) // 2
    stored = values.reshape(rows, codes.shape[1], fmt.group // 2)
    groups = values.new_zeros(rows, codes.shape[1], fmt.group).scatter_(-1, index, stored)
    return groups.view(rows, 2 * values.shape[1])


def _check_codes(codes: torch.Tensor, group: int) -> None:
    valid = (codes & 3) < (codes >> 2) if group == 4 else (codes == 0b0100) | (codes == 0b1110)
    if not valid.all():
        row, index = (int(i) for i in (~valid).nonzero()[0])
        raise ValueError(
            f"meta: expected the code of two ascending positions, got {int(codes[row, index]):#06b} "
            f"for row {row}, columns {index * group} to {index * group + group - 1}"
        )


def _fake(values, meta):
    torch._check(values.dim() == 2 and meta.dim() == 2 and values.shape[0] == meta.shape[0])
    return values.new_empty((values.shape[0], 2 * values.shape[1]))


def _samples(generator: torch.Generator):
    for dtype, fmt in FORMATS.items():
        values, meta = pack(sparse_weight(2 * fmt.row_multiple, 3 * fmt.column_multiple, dtype, generator))
        yield sample(values, meta)
        yield sample(values.T.contiguous().T, meta.T.contiguous().T)


_op = define_op("semi_structured_unpack", SCHEMA, reference=reference, fake=_fake, samples=_samples)
