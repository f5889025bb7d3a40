"""The layout of N:M weights with 4-bit values that `nm_q4_linear` reads: the Python mirror of csrc/common/nm_q4.h.

A weight is `scale * q` with `q` from -8 to 7, and a float16 scale for each row and 64 columns. The tensor `blocks` is uint8
`[strips, ceil(columns / 64), bytes]`. A block holds 64 columns of a strip of neighbouring rows. A strip has two halves, and a block has
four quarters of 16 columns. In a quarter a row stores `kept = 16 * N / M` values. Every M columns store N values and their positions,
ascending; a group with fewer non-zeros also stores its first zeros.

| pattern | rows of a strip | bytes of a block | bits a weight |
|---|---|---|---|
| 2:4 | 8 | 208 | 3.25 |
| 1:4 | 16 | 224 | 1.75 |
| 4:16 | 16 | 288 | 2.25 |

Value `k` of row `r` of half `h` in quarter `q` is at lane `i = kept * r + k`. The parts of a block are:

* 2:4 and 1:4: position in bits `2 q` and `2 q + 1` of byte `32 h + i`; `q4 + 8` in half `q % 2` of byte `64 + 64 * (q / 2) + 32 h + i`,
  where half 0 is the low one.
* 4:16: position in half `h` of byte `64 q + i`; `q4 + 8` in half `h` of byte `64 q + 32 + i`.
* Then the scale of each row.

The weight is filled with zeros to whole strips and blocks; the scales of such rows are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLUMNS = 64  # of a block
QUARTERS = 4
QUARTER_COLUMNS = COLUMNS // QUARTERS
ZERO = 8  # the stored form of the value 0
LEAST, MOST = -8, 7
PATTERNS = ((2, 4), (1, 4), (4, 16))


@dataclass(frozen=True)
class Q4Layout:
    """The sizes of a block, and the places of its parts.

    Attributes:
        n: stored values of a group.
        m: columns of a group.
    """

    n: int
    m: int

    @property
    def kept(self) -> int:
        """Number of values of a row in a quarter."""
        return QUARTER_COLUMNS * self.n // self.m

    @property
    def rows(self) -> int:
        """Rows of a strip."""
        return 64 // self.kept

    @property
    def wide(self) -> bool:
        """Whether positions have 4 bits, not 2."""
        return self.m > 4

    @property
    def scales_at(self) -> int:
        """The first byte of the scales."""
        return 256 if self.wide else 192

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return self.scales_at + 2 * self.rows

    def strips(self, rows: int) -> int:
        """Return the number of strips of a weight."""
        return -(-rows // self.rows)

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the shape of the blocks of a weight."""
        return self.strips(rows), -(-columns // COLUMNS), self.bytes

    def places(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Return the byte and the lowest bit of each position and of each value, each `[rows, quarters, kept]` int64."""
        row, quarter, k = torch.meshgrid(
            *(torch.arange(size, device=device) for size in (self.rows, QUARTERS, self.kept)), indexing="ij"
        )
        half, lane = row // (self.rows // 2), row % (self.rows // 2) * self.kept + k
        if self.wide:
            return (64 * quarter + lane, 4 * half), (64 * quarter + 32 + lane, 4 * half)
        return (32 * half + lane, 2 * quarter), (64 + 64 * (quarter // 2) + 32 * half + lane, 4 * (quarter % 2))


def nearest_code(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the whole numbers from -8 to 7, ties to even, whose products with `scale` are nearest; 0 where it is 0."""
    return (weight / scale.masked_fill(scale == 0, 1)).clamp(LEAST, MOST).round().masked_fill(scale == 0, 0)


def nearest_multiple(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the nearest of -8 to 7 times `scale`, never `-0.0`."""
    return scale * nearest_code(weight, scale) + 0.0


def quantize_weight(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the codes of `[rows, columns]` weights for `[rows, blocks]` float16 scales, as int64."""
    return nearest_code(weight.float(), scales.float().repeat_interleave(COLUMNS, 1)[:, : weight.shape[1]]).long()


def pack_q4(weight: torch.Tensor, scales: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Pack a weight of finite values, rounded to multiples of `scales`.

    Raises:
        ValueError: a group of the rounded weight has more than N non-zeros.
    """
    layout, (rows, columns) = Q4Layout(n, m), weight.shape
    codes = quantize_weight(weight, scales)
    counts = (codes.view(rows, columns // m, m) != 0).sum(-1)
    if (counts > n).any():
        row, group = (int(i) for i in (counts > n).nonzero()[0])
        raise ValueError(
            f"weight: expected at most {n} non-zeros in every {m} inputs, got {int(counts[row, group])} in row {row}, "
            f"columns {group * m} to {group * m + m - 1}"
        )
    strips, across, size = layout.shape(rows, columns)
    filled = torch.nn.functional.pad(codes, (0, across * COLUMNS - columns, 0, strips * layout.rows - rows))
    groups = filled.view(strips, layout.rows, across, COLUMNS // m, m)
    # Non-zeros first, then zeros, each in column order. The first N of them are sorted back into column order.
    chosen = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n].sort(-1).values
    kept = groups.gather(-1, chosen) + ZERO
    blocks = torch.zeros(strips, across, size, dtype=torch.int64, device=weight.device)
    for fields, (byte, bit) in zip((chosen, kept), layout.places(weight.device), strict=True):
        fields = fields.reshape(strips, layout.rows, across, QUARTERS * layout.kept).transpose(1, 2) << bit.flatten(1)
        blocks.scatter_add_(2, byte.flatten().expand(strips, across, -1), fields.flatten(2))
    packed = blocks.to(torch.uint8)
    of_strips = torch.nn.functional.pad(scales, (0, 0, 0, strips * layout.rows - rows)).view(strips, layout.rows, across)
    packed[..., layout.scales_at :] = _bytes(of_strips.transpose(1, 2))
    return packed


def read_q4(blocks: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what blocks hold, with the rows and columns that fill the last ones.

    Returns:
        The positions and the values `[rows, groups, N]` int64, and the scales `[rows, blocks]` float16.
    """
    layout, (strips, across, _) = Q4Layout(n, m), blocks.shape
    found = []
    for (byte, bit), most in zip(layout.places(blocks.device), (15 if layout.wide else 3, 15), strict=True):
        fields = blocks[..., byte].long() >> bit & most  # [strips, across, rows, quarters, kept]
        found.append(fields.transpose(1, 2).reshape(strips * layout.rows, across * COLUMNS // m, n))
    scales = _fresh(blocks[..., layout.scales_at :]).view(torch.float16).transpose(1, 2)
    return found[0], found[1] - ZERO, _fresh(scales).view(strips * layout.rows, across)


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the strides of its shape, which `contiguous` leaves as they are on axes of one element."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return _fresh(tensor).view(torch.uint8)


def unpack_q4(blocks: torch.Tensor, n: int, m: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight `[rows, columns]` float32 and its scales `[rows, blocks]` float16 without checking the blocks."""
    positions, values, scales = (part[:rows] for part in read_q4(blocks, n, m))
    scale = scales.float().repeat_interleave(COLUMNS // m, 1).unsqueeze(-1)
    stored = (scale * values).masked_fill(values == 0, 0)  # a zero of a negative scale is no -0.0
    weight = stored.new_zeros(rows, positions.shape[1], m).scatter_(2, positions, stored)
    return weight.view(rows, positions.shape[1] * m)[:, :columns].contiguous(), scales


def check_q4(blocks: torch.Tensor, n: int, m: int, rows: int, columns: int) -> None:
    """Raise `ValueError` unless these are blocks of an N:M weight `[rows, columns]`. Their dtype and shape are not checked."""
    positions, values, scales = read_q4(blocks, n, m)
    if not (finite := scales.isfinite()).all():
        row, block = (int(i) for i in (~finite).nonzero()[0])
        raise ValueError(f"blocks: expected finite scales, got {float(scales[row, block])} in row {row}, block {block}")
    wrong = (positions.diff(dim=-1) <= 0).any(-1)
    if wrong.any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"blocks: expected {n} ascending positions in every group, got {positions[row, group].tolist()} in row {row}, "
            f"group {group}"
        )
    if (past := (values[:rows, columns // m :] != 0).flatten(1).any(1)).any():
        row = int(past.nonzero()[0])
        raise ValueError(f"blocks: expected zeros after the {columns} columns, got another value in row {row}")
    if (values[rows:] != 0).any() or scales[rows:].view(torch.int16).any():
        raise ValueError(f"blocks: expected zeros after the {rows} rows")


def quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as 8 bits a value represent it: float32 multiples of a scale for each token and 64 columns.

    The scale is the largest magnitude of the columns divided by 127. A NaN or Inf makes all 64 columns NaN.
    """
    features = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -features % COLUMNS)).unflatten(-1, (-(-features // COLUMNS), COLUMNS))
    finite = blocks.isfinite().all(-1, keepdim=True)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    usable = finite & (scale > 0)
    codes = (blocks.where(usable, 0) / scale.where(usable, 1)).clamp(-127, 127).round()
    return (codes * scale.where(finite, torch.nan)).flatten(-2)[..., :features]
