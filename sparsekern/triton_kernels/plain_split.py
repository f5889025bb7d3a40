"""`plain_split` in Triton. ReLU has a closed form, one pass at the speed of memory; other activations are searched.

Floor of ReLU, on an H200: 8 bytes an entry in bf16; [2048, 11008] takes 0.04 ms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._common import CompileCase, on_device_of
from .gated_split import DTYPES, alike, launch

ENTRIES, WARPS = 1024, 4  # entries and warps of a program


@triton.jit
def split_relu(activated, preactivation, out, entries, ratio, scale, ENTRIES: tl.constexpr):
    """Store the lower of the minima of the two parabolas; `scale` is `1 / (1 + ratio)`."""
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = place < entries
    p = tl.load(activated + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(preactivation + place, mask=inside, other=0.0).to(tl.float32)
    blend = (ratio * p + m) * scale
    active = tl.where(blend < 0, 0.0, blend)
    silent = tl.where(m > 0, 0.0, m)
    active_cost = ratio * (p - active) * (p - active) + (active - m) * (active - m)
    silent_cost = ratio * p * p + (silent - m) * (silent - m)
    z = tl.where(silent_cost < active_cost, silent, active)
    tl.store(out + place, z.to(out.dtype.element_ty), mask=inside)


def plain_split(
    activated: torch.Tensor,
    preactivation: torch.Tensor,
    start: torch.Tensor,
    activation: str = "relu",
    ratio: float = 1.0,
    steps: int = 4,
) -> torch.Tensor:
    """Run the op `plain_split` for tensors of one shape and dtype; see `sparsekern.ops.plain_split`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    activated, preactivation, start = alike(activated, preactivation, start)
    z = torch.empty_like(activated)
    if activation != "relu":
        launch(activated, None, preactivation, start, None, z, activation, ratio, steps)
    elif entries := activated.numel():
        with on_device_of(activated):
            split_relu[(triton.cdiv(entries, ENTRIES),)](
                activated, preactivation, z, entries, ratio, 1 / (1 + ratio), ENTRIES=ENTRIES, num_warps=WARPS
            )
    return z


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations of ReLU, the same for every device; the search is compiled by `gated_split`."""
    for name in DTYPES.values():
        pointers = dict.fromkeys(("activated", "preactivation", "out"), f"*{name}:16")
        yield CompileCase(
            split_relu, {**pointers, "entries": "i32", "ratio": "fp32", "scale": "fp32"}, {"ENTRIES": ENTRIES}, WARPS, 3
        )
