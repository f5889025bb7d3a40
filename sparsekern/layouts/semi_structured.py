"""The 2:4 layout of PyTorch's semi-structured tensors (CUTLASS): the Python mirror of csrc/common/semi_structured.h.

A group is four weights of which at most two are not zero; a float32 weight stands for two of the four flags, so there it is two
weights of which at most one is not zero. A group's code is the positions of its two stored flags, two bits each, the lower first.
Codes fill metadata words (int16, or int32 for int8 weights) from the lowest bits, and the words are permuted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """What the layout looks like for a weight dtype: a `group` of columns keeps `group // 2`."""

    group: int
    meta_dtype: torch.dtype
    row_multiple: int

    @property
    def codes_per_word(self) -> int:
        return self.meta_dtype.itemsize * 2

    @property
    def column_multiple(self) -> int:
        """Words are permuted in pairs along a row."""
        return 2 * self.codes_per_word * self.group


FORMATS = {
    torch.bfloat16: Format(4, torch.int16, 32),
    torch.float16: Format(4, torch.int16, 32),
    torch.float32: Format(2, torch.int16, 32),
    torch.int8: Format(4, torch.int32, 16),
}


def encode(flags: torch.Tensor) -> torch.Tensor:
    """The codes of groups from their non-zero flags `[..., 4]`; a group with fewer than two non-zeros stores zeros beside them."""
    a, b, _, d = flags.unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(a & b, 1, torch.where(d | (first == 2), 3, 2))
    return first | second << 2


def word_offsets(rows: int, words: int, fmt: Format, device: torch.device) -> torch.Tensor:
    """Where the word of each `[row, column]` is stored: `[rows, words]` flat offsets into the stored metadata."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(words, device=device)
    block = fmt.row_multiple
    spread = row // block * block + row % 8 * (block // 8) + row % block // 8
    # Two by two blocks of words are transposed, then pairs of columns are stored one after another.
    return column // 2 * 2 * rows + (spread // 2 * 2 + column % 2) * 2 + spread % 2
