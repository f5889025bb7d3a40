"""The C++ kernels of `obs_sweep` (csrc/cuda/obs_sweep.cu), for the loop of `obs_sweep.py`."""

from __future__ import annotations

import torch

from .decode import is_built
from .sweep_state import Block, Sweep

ROWS_PER_WARP = 4
MAX_WARPS = 8


class CudaKernels:
    """The kernels of a sweep; see `Kernels` of `obs_sweep.py`."""

    CALLS = 64  # competing blocks per clearing of the workspace
    TOGETHER = (
        8  # blocks of a call: 1024 columns, whose products have fewer than `products.PIECES_FROM` multiply-adds below 32768 rows
    )

    def __init__(self, state: Sweep) -> None:
        self._ops = torch.ops.sparsekern_cuda
        self._state = state
        self._results = state.delta, state.mask, state.new_weight, state.row_error, state.status
        self._warps = warps_for(len(state.weight), _processors(state.weight.device))
        self._workspace: list[torch.Tensor] | None = None
        self._tiles = self._calls = 0

    def check_values(self) -> None:
        self._ops.obs_sweep_check_factor(self._state.factor, self._state.status)

    def prune(self, first: int, last: int, n: int, m: int) -> None:
        self._prune(first, last, "group" if m else "given", n, m)

    def prune_best(self, first: int, last: int, kept: int, scope: str) -> bool:
        if scope == "row":
            self._prune(first, last, "row", kept, 0)
            return True
        if not self._rows_fit():
            return False
        cleared, shared, call = self._calls_of(1)
        state = self._state
        self._ops.obs_sweep_competing_block(
            state.weight, state.factor, *self._results, cleared, shared, first, last, kept, self._tiles, call
        )
        return True

    def _rows_fit(self) -> bool:
        """Make the workspace of competing blocks; return whether one launch takes all rows."""
        if self._workspace is None:
            calls = min(self.CALLS, len(self._state.blocks))
            *self._workspace, self._tiles = self._ops.obs_sweep_workspace(self._state.weight, calls)
        return self._tiles > 0

    def _calls_of(self, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the workspace, and the first of `count` rows of it that are clear."""
        assert self._workspace is not None
        cleared, shared = self._workspace
        if self._calls + count > len(cleared):
            cleared.zero_()
            self._calls = 0
        self._calls += count
        return cleared, shared, self._calls - count

    def together(self, choice: str) -> int:
        loops = is_built("obs_sweep_blocks")
        return self.TOGETHER if loops and (choice != "block" or self._rows_fit()) else 1

    def prune_blocks(self, blocks: list[Block], kept: list[int], choice: str, m: int) -> None:
        state = self._state
        columns = [block.first for block in blocks] + [blocks[-1].border], [block.last for block in blocks], kept
        fresh = blocks[0].first == 0
        if choice == "block":
            cleared, shared, call = self._calls_of(len(blocks))
            self._ops.obs_sweep_competing_blocks(
                state.weight, state.factor, *self._results, cleared, shared, *columns, self._tiles, call, fresh
            )
        else:
            self._ops.obs_sweep_blocks(state.weight, state.factor, *self._results, *columns, choice, m, self._warps, fresh)

    def score(self, first: int, last: int, origin: int, delta: torch.Tensor, scores: torch.Tensor) -> None:
        state = self._state
        self._ops.obs_sweep_scores(state.weight, state.factor, delta, scores, state.status, first, last, origin, self._warps)

    def _prune(self, first: int, last: int, choice: str, kept: int, group: int) -> None:
        state = self._state
        self._ops.obs_sweep_block(state.weight, state.factor, *self._results, first, last, choice, kept, group, self._warps)


def warps_for(rows: int, processors: int) -> int:
    """Return the warps of a thread block.

    Each block reads a whole triangle of the factor. Blocks are therefore large, unless half of the multiprocessors would have none.
    """
    warps = MAX_WARPS
    while warps > 1 and 2 * -(-rows // (ROWS_PER_WARP * warps)) <= processors:
        warps //= 2
    return warps


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
