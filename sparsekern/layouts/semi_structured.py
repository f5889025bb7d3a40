"""The 2:4 layout of PyTorch's semi-structured tensors (CUTLASS): the Python mirror of csrc/common/semi_structured.h.

A group is four weights with at most two non-zeros. A float32 weight stands for two of the four flags, so its group is two weights with
at most one non-zero. The code of a group holds the positions of its two stored flags, two bits each, the lower first. Codes fill
metadata words (int16, or int32 for int8 weights) from the lowest bits, and the words are permuted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """The layout for a weight dtype.

    Attributes:
        group: columns of a group, which keeps `group // 2` of them.
        meta_dtype: dtype of a metadata word.
        row_multiple: the rows of a weight must be a multiple of this.
    """

    group: int
    meta_dtype: torch.dtype
    row_multiple: int

    @property
    def codes_per_word(self) -> int:
        """Number of codes in a metadata word."""
        return self.meta_dtype.itemsize * 2

    @property
    def column_multiple(self) -> int:
        """Divisor of the columns: words are permuted in pairs along a row."""
        return 2 * self.codes_per_word * self.group


FORMATS = {
    torch.bfloat16: Format(4, torch.int16, 32),
    torch.float16: Format(4, torch.int16, 32),
    torch.float32: Format(2, torch.int16, 32),
    torch.int8: Format(4, torch.int32, 16),
}


def encode(flags: torch.Tensor) -> torch.Tensor:
    """Return the codes of groups from their non-zero flags `[..., 4]`.

    A group with fewer than two non-zeros also stores zeros.
    """
    a, b, _, d = flags.unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(a & b, 1, torch.where(d | (first == 2), 3, 2))
    return first | second << 2


def word_offsets(rows: int, words: int, fmt: Format, device: torch.device) -> torch.Tensor:
    """Return the flat offset of each metadata word in the stored metadata, `[rows, words]`."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(words, device=device)
    block = fmt.row_multiple
    spread = row // block * block + row % 8 * (block // 8) + row % block // 8
    # Blocks of two by two words are transposed. Then pairs of columns are stored one after another.
    return column // 2 * 2 * rows + (spread // 2 * 2 + column % 2) * 2 + spread % 2
