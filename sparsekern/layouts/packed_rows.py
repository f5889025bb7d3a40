"""The layouts that `bitmask_linear` and `nm_linear` read: the Python mirror of csrc/common/packed_rows.h.

A half value has 16 bits, the lanes of a vector 32. So that no kernel has to spread values before it uses them, two values share a
unit of 4 bytes: `lanes` (2; 1 of float32) values that different accumulators want, the first in the low half.

**Bitmask rows.** Rows are sorted by their number of non-zeros, and `lanes` neighbours form a group. The `k`-th unit of a group holds
the `k`-th non-zero of each of its rows; a row that ends before the longest of its group is followed by zeros. `values` holds group
after group, then `SLACK` units, so that a vector may be read from wherever a value lies. `bitmask` holds a row's bits in words of 64
columns, bit `j % 64` of word `j // 64` for column `j`; `order` which row of the weight it is; `starts` the unit where each tile of
`TILE_ROWS` rows starts, and where the last one ends.

**N:M rows.** A group of M columns stores N values and their positions, ascending, zeros beside the non-zeros where there are fewer.
The stored values of a row, in order, make blocks of 16 units: unit `d` holds values `d` and `16 + d` (of float32: value `d`). `codes`
holds the positions, 2 bits each for M of at most 4 and else 4, in the order of the values, from the lowest bit of int32 words on. What
fills the last block is zero.
"""

from __future__ import annotations

import torch

WORD = 64  # columns of a word of bits
TILE_ROWS = 16
SLACK = 64  # units
UNITS = 16  # of a block of N:M values
MOST_M = 16


def lanes(dtype: torch.dtype) -> int:
    """Values in a unit."""
    return 4 // dtype.itemsize


def words(columns: int) -> int:
    """Words of bits in a row."""
    return -(-columns // WORD)


def unit_counts(counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How many units each group has, from the non-zeros of the rows in stored order."""
    group = lanes(dtype)
    padded = torch.nn.functional.pad(counts, (0, -len(counts) % group))
    return padded.view(-1, group).amax(1) if len(counts) else padded


def tile_starts(units: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where each tile starts, and where the last one ends, in units."""
    ends = torch.nn.functional.pad(units.cumsum(0), (1, 0))
    return torch.cat((ends[: len(units) : TILE_ROWS // lanes(dtype)], ends[-1:]))


def value_places(counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where each non-zero lies in `values`, row after row in stored order."""
    group = lanes(dtype)
    units = unit_counts(counts, dtype)
    row = torch.arange(len(counts), device=counts.device)
    base = (units.cumsum(0) - units)[row // group] * group + row % group if len(counts) else row
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=counts.device) * group + torch.repeat_interleave(base - group * before, counts)


def bits_to_words(flags: torch.Tensor) -> torch.Tensor:
    """`[rows, columns]` bool to `[rows, words]` int64."""
    rows, columns = flags.shape
    padded = torch.nn.functional.pad(flags, (0, -columns % WORD)).view(rows, words(columns) * 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    packed = (padded.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int64) if packed.numel() else packed.new_empty((rows, words(columns)), dtype=torch.int64)


def words_to_bits(bitmask: torch.Tensor) -> torch.Tensor:
    """`[rows, words]` int64 to `[rows, 64 * words]` bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask.contiguous().view(torch.uint8).unsqueeze(-1) >> shifts) & 1).bool().flatten(1)


def pack_bitmask_rows(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`-0.0` counts as zero; NaN is kept."""
    flags = weight != 0
    counts = flags.sum(1)
    counts, order = counts.sort(stable=True)
    flags = flags[order]
    units = unit_counts(counts, weight.dtype)
    values = weight.new_zeros((int(units.sum()) + SLACK) * lanes(weight.dtype))
    values[value_places(counts, weight.dtype)] = weight[order][flags]
    return {
        "values": values,
        "bitmask": bits_to_words(flags),
        "starts": tile_starts(units, weight.dtype),
        "order": order.to(torch.int32),
    }


def unpack_bitmask_rows(values: torch.Tensor, bitmask: torch.Tensor, order: torch.Tensor, columns: int) -> torch.Tensor:
    flags = words_to_bits(bitmask)[:, :columns]
    sorted_rows = values.new_zeros(flags.shape)
    sorted_rows[flags] = values[value_places(flags.sum(1), values.dtype)]
    return torch.empty_like(sorted_rows).index_copy_(0, order.long(), sorted_rows)


def code_bits(m: int) -> int:
    return 2 if m <= 4 else 4


def block_values(dtype: torch.dtype) -> int:
    return UNITS * lanes(dtype)


def stored_per_row(columns: int, n: int, m: int, dtype: torch.dtype) -> int:
    """Values that a row takes, those included that fill its last block."""
    block = block_values(dtype)
    return -(-(columns // m * n) // block) * block


def _in_units(values: torch.Tensor, to: bool) -> torch.Tensor:
    """`[rows, stored]` from the order of columns to that of units, or back."""
    group = lanes(values.dtype)
    shape = (group, UNITS) if to else (UNITS, group)
    blocks = values.shape[1] // block_values(values.dtype)
    return values.view(-1, blocks, *shape).transpose(2, 3).flatten(1) if values.numel() else values


def fill_of(values: torch.Tensor, kept: int) -> torch.Tensor:
    """What `[rows, stored]` values hold behind the first `kept` of each row in the order of columns."""
    block = block_values(values.dtype)
    first = kept // block * block
    return _in_units(values[:, first:].contiguous(), to=False)[:, kept - first :]


def pack_nm_rows(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
    """The first N of each group where it has more non-zeros: callers check that it has not."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // m, m)
    # Non-zeros first, then zeros, either in the order of the columns; the first N of those, in the order of the columns again.
    chosen = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n].sort(-1).values
    stored = stored_per_row(columns, n, m, weight.dtype)
    fill = (0, stored - columns // m * n)
    values = torch.nn.functional.pad(groups.gather(-1, chosen).flatten(1) + 0.0, fill)  # -0.0 becomes 0.0
    per_word = 32 // code_bits(m)
    codes = torch.nn.functional.pad(chosen.flatten(1), fill).view(rows, stored // per_word, per_word)
    shifts = torch.arange(0, 32, code_bits(m), device=weight.device)
    return {
        "values": _in_units(values, to=True).contiguous(),
        "codes": (codes << shifts).sum(-1).to(torch.int32),
    }


def positions(codes: torch.Tensor, m: int) -> torch.Tensor:
    """`[rows, stored]` int32: the position in its group of each stored value, in the order of columns."""
    shifts = torch.arange(0, 32, code_bits(m), dtype=torch.int32, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & (2 ** code_bits(m) - 1)).flatten(1)


def unpack_nm_rows(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, columns: int) -> torch.Tensor:
    rows, kept = values.shape[0], columns // m * n
    place = positions(codes, m)[:, :kept].view(rows, columns // m, n).long()
    stored = _in_units(values, to=False)[:, :kept].view(rows, columns // m, n)
    return values.new_zeros(rows, columns // m, m).scatter_(2, place, stored).view(rows, columns)
