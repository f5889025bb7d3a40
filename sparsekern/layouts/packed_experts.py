"""Layout of the packed experts that `bitmask_experts_linear` and `nm_experts_linear` read.

The weights of all experts of a layer have one shape. Each is packed by itself in the rows of `packed_rows`, and the tensors are put
together:

* **Bitmask.** `values`: the slots of all experts in order, then `SLACK` slots of zeros. `bitmask`, `starts` and `order` have a first axis
  of experts. `starts` counts slots from the first slot of the first expert.
* **N:M.** `values` and `codes` have a first axis of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packed_rows import SLACK, check_bitmask_rows, lanes, tiles, words

BITMASK_NAMES = ("values", "bitmask", "starts", "order")


def join_bitmask_experts(
    packed: Sequence[dict[str, torch.Tensor]], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Put the bitmask rows of experts together.

    Args:
        packed: the packed tensors of each expert, all on one device.
        shape: `(out_features, in_features)` of every expert.
        dtype: dtype of the values.
    """
    if not packed:
        rows, columns = shape
        return {
            "values": torch.zeros(SLACK * lanes(dtype), dtype=dtype),
            "bitmask": torch.empty((0, rows, words(columns)), dtype=torch.int64),
            "starts": torch.empty((0, tiles(rows) + 1), dtype=torch.int64),
            "order": torch.empty((0, rows), dtype=torch.int32),
        }
    slack = SLACK * lanes(dtype)
    values = [expert["values"][:-slack] for expert in packed]
    slots = torch.tensor([0, *(len(own) // lanes(dtype) for own in values[:-1])], device=values[0].device).cumsum(0)
    return {
        "values": torch.cat((*values, values[0].new_zeros(slack))),
        "bitmask": torch.stack([expert["bitmask"] for expert in packed]),
        "starts": torch.stack([expert["starts"] for expert in packed]) + slots[:, None],
        "order": torch.stack([expert["order"] for expert in packed]),
    }


def bitmask_rows_of(
    values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, expert: int
) -> dict[str, torch.Tensor]:
    """Return the bitmask rows of one expert, views where possible. Its slack holds values of the next expert."""
    first, end = (int(start) for start in starts[expert, [0, -1]])
    group = lanes(values.dtype)
    return {
        "values": values[first * group : (end + SLACK) * group],
        "bitmask": bitmask[expert],
        "starts": starts[expert] - first,
        "order": order[expert],
    }


def check_bitmask_experts(
    values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, columns: int
) -> None:
    """Raise `ValueError`, naming the tensor, unless these are bitmask rows of experts with `columns` columns.

    Dtypes and shapes are not checked.
    """
    check_ends(values, starts)
    for expert in range(len(order)):
        try:
            check_bitmask_rows(**bitmask_rows_of(values, bitmask, starts, order, expert), columns=columns)
        except ValueError as error:
            raise ValueError(f"{error} (expert {expert})") from error


def check_ends(values: torch.Tensor, starts: torch.Tensor) -> None:
    """Raise `ValueError` unless each expert begins where the one before it ends, and the last one ends with the values."""
    slots = len(values) // lanes(values.dtype) - SLACK
    begins = torch.cat((starts[:, 0], starts.new_tensor([slots])))
    ends = torch.cat((starts.new_zeros(1), starts[:, -1]))
    wrong = begins != ends
    if wrong.any():
        expert = int(wrong.nonzero()[0])
        place = f"expert {expert} to begin" if expert < len(starts) else "the values to end"
        raise ValueError(f"starts: expected {place} at slot {int(ends[expert])}, got {int(begins[expert])}")
