"""Round trips are in test_semi_structured_pack.py; here is what is refused."""

from __future__ import annotations

import pytest
import torch

from sparsekern.layouts.semi_structured import FORMATS, word_offsets
from sparsekern.ops import semi_structured_pack, semi_structured_unpack
from sparsekern.ops.semi_structured_pack import sparse_weight
from sparsekern.ops.semi_structured_unpack import reference

VALID = {4: (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110), 2: (0b0100, 0b1110)}


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_code_that_packing_never_writes_is_named(isa, generator, dtype):
    fmt = FORMATS[dtype]
    values, meta = semi_structured_pack(sparse_weight(2 * fmt.row_multiple, 4 * fmt.column_multiple, dtype, generator))
    rows, words = meta.shape
    row, word, position = fmt.row_multiple + 3, 5, fmt.codes_per_word - 1
    group = word * fmt.codes_per_word + position
    place = word_offsets(rows, words, fmt, meta.device)[row, word]
    for code in range(16):
        damaged = meta.clone()
        stored = damaged.view(-1)[place].item() & ~(15 << 4 * position)
        damaged.view(-1)[place] = torch.tensor(stored | code << 4 * position).to(meta.dtype)
        for unpack in (semi_structured_unpack, reference):
            if code in VALID[fmt.group]:
                assert unpack(values, damaged).shape == (rows, 2 * values.shape[1])
                continue
            columns = f"columns {group * fmt.group} to {group * fmt.group + fmt.group - 1}"
            with pytest.raises(ValueError, match=f"^meta: .* got 0b{code:04b} for row {row}, {columns}"):
                unpack(values, damaged)


@pytest.mark.parametrize(
    ("values", "meta", "error", "message"),
    [
        ((32, 32), (32, 3), ValueError, r"meta: expected shape \(32, 4\), got \(32, 3\)"),
        ((32, 32), (64, 4), ValueError, r"meta: expected shape \(32, 4\), got \(64, 4\)"),
        ((32, 24), (32, 3), ValueError, r"values: expected a shape that is a multiple of \(32, 16\) for bfloat16, got \(32, 24\)"),
        ((31, 32), (31, 4), ValueError, r"values: expected a shape that is a multiple of \(32, 16\)"),
    ],
)
def test_shapes_are_refused(values, meta, error, message):
    with pytest.raises(error, match=message):
        semi_structured_unpack(torch.zeros(values, dtype=torch.bfloat16), torch.zeros(meta, dtype=torch.int16))


def test_dtypes_are_refused():
    values, meta = semi_structured_pack(torch.zeros(32, 64, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="meta: expected dtype int16, got int32"):
        semi_structured_unpack(values, meta.int())
    with pytest.raises(TypeError, match="values: expected dtype .* got float64"):
        semi_structured_unpack(values.double(), meta)
