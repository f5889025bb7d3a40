"""`masked_lstsq` on a CUDA device: the loop of conjugate gradients, one product and one kernel per iteration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .devices import YES, Support
from .implementation import Implementation
from .products import add_product, full_float32
from .values import LeftToReference, raise_if

if TYPE_CHECKING:
    from ..triton_kernels.masked_lstsq import Rows


class AsyncScalar:
    """A device scalar, copied to pinned memory asynchronously after the work enqueued so far."""

    def __init__(self, number: torch.Tensor) -> None:
        pinned = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=number.is_cuda)
        self._copy = pinned.copy_(number, non_blocking=True)
        self._event = torch.cuda.Event() if number.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(number.device))

    def value(self) -> int:
        """Wait for the copy and return the number."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._copy)


def _triton(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    damping: float = 0.0,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    solver: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ..triton_kernels.masked_lstsq import prepare

    if not weight.numel():
        raise LeftToReference("an empty matrix")
    rows = prepare(weight, gram, mask, start, damping)
    with full_float32():
        add_product(rows.product, rows.direction, rows.unit, begins=True)
        rows.begin_()
        _iterate(rows, tolerance, max_iterations)
    raise_if(rows.status)
    new_weight = torch.mul(rows.solution, rows.to_weight, out=torch.empty_like(weight, memory_format=torch.contiguous_format))
    return new_weight, rows.error.clamp(min=0), (rows.gamma > 0).sum()


def _iterate(rows: Rows, tolerance: float, max_iterations: int) -> None:
    """Iterate until no row is active.

    The host checks the previous iteration once the next one is enqueued, so that the device never waits for it. At most one extra
    iteration runs, and changes nothing.
    """
    latest = None
    for iteration in range(1, max_iterations + 1):
        add_product(rows.product, rows.direction, rows.unit, begins=True)
        rows.step_(tolerance, iteration)
        before, latest = latest, AsyncScalar(rows.latest)
        if before is not None and before.value() < iteration - 1:
            return


def _supports(*args, solver: str = "auto", **kwargs) -> Support:
    return Support(False, "solver is 'cholesky', which has no kernel") if solver == "cholesky" else YES


IMPLEMENTATIONS = (Implementation("triton", _triton, _supports),)
