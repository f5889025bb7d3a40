"""Layouts of packed weights that `bitmask_linear` and `nm_linear` read: the Python mirror of csrc/common/packed_rows.h.

A half value has 16 bits, a lane of a vector 32. Kernels should use values without spreading them first. So values for different
accumulators share a *slot* of 4 bytes: two half values, the first in the low half, or one float32 value.

**Bitmask rows.** Rows are sorted stably by their number of non-zeros. `lanes` neighbouring rows form a group. Slot `k` of a group holds
the `k`-th non-zero of each row in the group, or zero for a row with fewer. The tensors are:

* `values`: the slots of all groups in order, then `SLACK` slots of zeros, so that a whole vector can be read at any value;
* `bitmask`: the bits of each stored row in words of 64 columns; bit `j % 64` of word `j // 64` stands for column `j`;
* `starts`: the first slot of each tile of `TILE_ROWS` stored rows, and the end of the last tile;
* `order`: the index of each stored row in the weight.

**N:M rows.** A group of M columns stores N values and their positions, ascending. A group with fewer non-zeros also stores its first
zeros. The tensors are:

* `values`: the stored values of a row in blocks of `BLOCK_SLOTS` slots: slot `d` holds values `d` and `16 + d` (of float32: value `d`);
* `codes`: the positions in the order of the values, from the lowest bit of int32 words: 2 bits each for M up to 4, else 4 bits.

The last block of a row is filled with zeros.
"""

from __future__ import annotations

import torch

from .._counts import groups_over

WORD = 64  # columns of a word of bits
TILE_ROWS = 16
SLACK = 64  # slots
BLOCK_SLOTS = 16  # of a block of N:M values
MOST_M = 16
_INTEGERS = {2: torch.int16, 4: torch.int32}


def lanes(dtype: torch.dtype) -> int:
    """Return the number of values in a slot."""
    return 4 // dtype.itemsize


def words(columns: int) -> int:
    """Return the number of words that hold the bits of a row."""
    return -(-columns // WORD)


def tiles(rows: int) -> int:
    """Return the number of tiles of the rows."""
    return -(-rows // TILE_ROWS)


def slot_counts(counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the number of slots of each group.

    Args:
        counts: `[rows]` int64, the non-zeros of each row in stored order.
        dtype: dtype of the values.
    """
    group = lanes(dtype)
    padded = torch.nn.functional.pad(counts, (0, -len(counts) % group))
    return padded.view(-1, group).amax(1) if len(counts) else padded


def tile_starts(slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the first slot of each tile and the end of the last tile.

    Args:
        slots: `[groups]` int64, the slots of each group.
        dtype: dtype of the values.
    """
    ends = torch.nn.functional.pad(slots.cumsum(0), (1, 0))
    return torch.cat((ends[: len(slots) : TILE_ROWS // lanes(dtype)], ends[-1:]))


def value_places(counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the index in `values` of each non-zero, row by row in stored order."""
    group = lanes(dtype)
    slots = slot_counts(counts, dtype)
    row = torch.arange(len(counts), device=counts.device)
    base = (slots.cumsum(0) - slots)[row // group] * group + row % group if len(counts) else row
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=counts.device) * group + torch.repeat_interleave(base - group * before, counts)


def bits_to_words(flags: torch.Tensor) -> torch.Tensor:
    """Pack `[rows, columns]` bool into `[rows, words]` int64."""
    rows, columns = flags.shape
    padded = torch.nn.functional.pad(flags, (0, -columns % WORD)).view(rows, words(columns) * 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    packed = (padded.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int64) if packed.numel() else packed.new_empty((rows, words(columns)), dtype=torch.int64)


def words_to_bits(bitmask: torch.Tensor) -> torch.Tensor:
    """Unpack `[rows, words]` int64 into `[rows, 64 * words]` bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask.contiguous().view(torch.uint8).unsqueeze(-1) >> shifts) & 1).bool().flatten(1)


def pack_bitmask_rows(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack a weight as bitmask rows. `-0.0` counts as zero; NaN is kept."""
    flags = weight != 0
    counts = flags.sum(1)
    counts, order = counts.sort(stable=True)
    flags = flags[order]
    slots = slot_counts(counts, weight.dtype)
    values = weight.new_zeros((int(slots.sum()) + SLACK) * lanes(weight.dtype))
    values[value_places(counts, weight.dtype)] = weight[order][flags]
    return {
        "values": values,
        "bitmask": bits_to_words(flags),
        "starts": tile_starts(slots, weight.dtype),
        "order": order.to(torch.int32),
    }


def unpack_bitmask_rows(values: torch.Tensor, bitmask: torch.Tensor, order: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack bitmask rows into `[rows, columns]` without checking them."""
    flags = words_to_bits(bitmask)[:, :columns]
    sorted_rows = values.new_zeros(flags.shape)
    sorted_rows[flags] = values[value_places(flags.sum(1), values.dtype)]
    return torch.empty_like(sorted_rows).index_copy_(0, order.long(), sorted_rows)


def check_bitmask_rows(
    values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, columns: int
) -> None:
    """Raise `ValueError`, naming the tensor, unless these are bitmask rows of `columns` columns.

    Dtypes and shapes are not checked.
    """
    rows = len(order)
    flags = words_to_bits(bitmask)
    stray = flags[:, columns:].any(1)
    if stray.any():
        raise ValueError(f"bitmask: expected zeros past column {columns - 1}, got a set bit in row {int(stray.nonzero()[0])}")
    slots = slot_counts(flags.sum(1), values.dtype)
    expected = (int(slots.sum()) + SLACK) * lanes(values.dtype)
    if values.numel() != expected:
        raise ValueError(f"values: expected {expected} values for the bits set in bitmask, got {values.numel()}")
    wrong = starts != tile_starts(slots, values.dtype)
    if wrong.any():
        tile = int(wrong.nonzero()[0])
        raise ValueError(
            f"starts: expected the first slot after the values of earlier tiles, got {int(starts[tile])} for tile {tile}"
        )
    if not torch.equal(order.sort().values, torch.arange(rows, dtype=torch.int32, device=order.device)):
        raise ValueError(f"order: expected each row from 0 to {rows - 1} once")


def code_bits(m: int) -> int:
    """Return the bits of a position."""
    return 2 if m <= 4 else 4


def block_values(dtype: torch.dtype) -> int:
    """Return the number of values in a block."""
    return BLOCK_SLOTS * lanes(dtype)


def stored_per_row(columns: int, n: int, m: int, dtype: torch.dtype) -> int:
    """Return the number of values stored for a row, including the fill of its last block."""
    block = block_values(dtype)
    return -(-(columns // m * n) // block) * block


def _in_slots(values: torch.Tensor, to: bool) -> torch.Tensor:
    """Reorder `[rows, stored]` from column order to slot order, or back."""
    group = lanes(values.dtype)
    shape = (group, BLOCK_SLOTS) if to else (BLOCK_SLOTS, group)
    blocks = values.shape[1] // block_values(values.dtype)
    return values.view(-1, blocks, *shape).transpose(2, 3).flatten(1) if values.numel() else values


def check_fits(weight: torch.Tensor, n: int, m: int) -> None:
    """Raise `ValueError` if a group of M columns has more than N non-zeros, naming the first one."""
    if groups_over(weight, n, m):
        rows, columns = weight.shape
        counts = (weight.reshape(rows, columns // m, m) != 0).sum(-1)
        row, group = (int(i) for i in (counts > n).nonzero()[0])
        raise ValueError(
            f"weight: expected at most {n} non-zeros in every {m} inputs, got {int(counts[row, group])} in row {row}, "
            f"columns {group * m} to {group * m + m - 1}"
        )


def pack_nm_rows(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
    """Pack a weight as N:M rows.

    A group with more than N non-zeros, which `check_fits` refuses, keeps the first N. `-0.0` becomes `0.0`; a NaN keeps its bits.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // m, m)
    # Non-zeros first, then zeros, each in column order. The first N of them are sorted back into column order.
    chosen = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n].sort(-1).values
    stored = stored_per_row(columns, n, m, weight.dtype)
    fill = (0, stored - columns // m * n)
    # Copied as integers: copies of half values do not always keep the bits of a NaN.
    kept = groups.view(_INTEGERS[weight.dtype.itemsize]).masked_fill(groups == 0, 0).gather(-1, chosen).flatten(1)
    values = torch.nn.functional.pad(kept, fill)
    per_word = 32 // code_bits(m)
    codes = torch.nn.functional.pad(chosen.flatten(1), fill).view(rows, stored // per_word, per_word)
    shifts = torch.arange(0, 32, code_bits(m), device=weight.device)
    return {
        "values": _in_slots(values, to=True).contiguous().view(weight.dtype),
        "codes": (codes << shifts).sum(-1).to(torch.int32),
    }


def positions(codes: torch.Tensor, m: int) -> torch.Tensor:
    """Return the position of each stored value in its group, `[rows, stored]` int32 in column order."""
    shifts = torch.arange(0, 32, code_bits(m), dtype=torch.int32, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & (2 ** code_bits(m) - 1)).flatten(1)


def unpack_nm_rows(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, columns: int) -> torch.Tensor:
    """Unpack N:M rows into `[rows, columns]` without checking them."""
    rows, kept = values.shape[0], columns // m * n
    place = positions(codes, m)[:, :kept].view(rows, columns // m, n).long()
    stored = _in_slots(values, to=False)[:, :kept].view(rows, columns // m, n)
    return values.new_zeros(rows, columns // m, m).scatter_(2, place, stored).view(rows, columns)


def check_nm_rows(values: torch.Tensor, codes: torch.Tensor, n: int, m: int, columns: int) -> None:
    """Raise `ValueError`, naming the tensor, unless these are N:M rows of `columns` columns.

    Dtypes and shapes are not checked.
    """
    rows, kept = values.shape[0], columns // m * n
    place = positions(codes, m)
    if place[:, kept:].any():
        raise ValueError(f"codes: expected zeros after the {kept} positions of a row")
    if _fill_of(values, kept).any():  # a NaN too, which would reach every output of the row
        raise ValueError(f"values: expected zeros after the {kept} values of a row")
    place = place[:, :kept].view(rows, columns // m, n)
    wrong = (place >= m).any(-1) | (place.diff(dim=-1) <= 0).any(-1)
    if wrong.any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"codes: expected {n} ascending positions below {m} in every group, got {place[row, group].tolist()} in row {row}, "
            f"group {group}"
        )


def _fill_of(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the values after the first `kept` of each row in column order, from `[rows, stored]`."""
    block = block_values(values.dtype)
    first = kept // block * block
    return _in_slots(values[:, first:].contiguous(), to=False)[:, kept - first :]
