"""`obs_sweep` on a CUDA device: the loop over blocks of columns. What is done inside a block is for kernels, one launch each.

With `delta = weight - new_weight`, a block that begins at column `a` needs `delta[:, :a] @ factor[:a, block]` when it is reached, and
nothing else of the columns before it. Taken block by block that product is long and thin: 128 columns of results have tiles for a
quarter of the multiprocessors. So it is taken by halves: as soon as the left half of a range of columns is done, what all of it adds to
all of the right half is one product. Each block still waits for one product and its kernel, but three quarters of the arithmetic is
in products 1024 columns wide and more. What is pending stands in `delta` itself, in the columns that will overwrite it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..pattern import pruned_count
from .devices import YES, Support
from .products import add_product, full_float32
from .table import Implementation
from .values import raise_if, value_checks, values_are_checked

LAUNCH_COLUMNS = 128  # the most of one launch
MAX_GROUP = 64
ALIGNMENT = 4  # of columns, for the CUDA C++ kernels


class Block(NamedTuple):
    """Columns `[begin, end)` of the weight, which the sweep has at `[first, last)`; up to `border`, where the next begins, is padding."""

    begin: int
    end: int
    first: int
    last: int
    border: int


def block_size_for(m: int, block_size: int, competing: bool) -> int:
    """Columns of a block: the caller's where they compete with one another, else as many whole groups of `m` as a launch takes."""
    if competing:
        return block_size
    aligned = math.lcm(m or 1, ALIGNMENT)
    return LAUNCH_COLUMNS // aligned * aligned or LAUNCH_COLUMNS // m * m


def column_blocks(columns: int, size: int, alignment: int) -> list[Block]:
    """Blocks of `size` columns, each beginning at a multiple of `alignment` columns of the sweep's matrices."""
    blocks, first = [], 0
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        last = first + end - begin
        blocks.append(Block(begin, end, first, last, -(-last // alignment) * alignment))
        first = blocks[-1].border
    return blocks


def by_halves(count: int, run: Callable[[int], None], update: Callable[[int, int, int], None]) -> None:
    """`run(i)` for each `i` in order, and between them `update(first, middle, last)`: from `[first, middle)`, all of which has run, to
    `[middle, last)`, none of which has. Each pair is updated once, in `count - 1` updates, one before each `run` but the first."""

    def part(first: int, last: int) -> None:
        if last - first == 1:
            return run(first)
        middle = first + (1 << (last - first - 1).bit_length() - 1)
        part(first, middle)
        update(first, middle, last)
        part(middle, last)

    part(0, count)


@dataclass(frozen=True)
class Sweep:
    """The tensors of one sweep: `[rows, columns]` with the columns where `blocks` say, contiguous and at multiples of 16 bytes."""

    blocks: list[Block]
    weight: torch.Tensor
    factor: torch.Tensor  # [columns, columns]; padding is dead features
    mask: torch.Tensor  # given, or found block by block
    delta: torch.Tensor  # float32; of columns to come, what is pending
    new_weight: torch.Tensor
    row_error: torch.Tensor  # [rows] float32
    status: torch.Tensor  # int32


class Kernels(Protocol):
    """What a library of kernels does to a sweep: one launch for at most `LAUNCH_COLUMNS` columns `[first, last)` of a block."""

    def check_values(self) -> None:
        """Set the status if the factor is not finite anywhere. (The weight is looked at by the other functions.)"""

    def prune(self, first: int, last: int, n: int, m: int) -> None:
        """Prune to the mask of the sweep, or with `m` to N of every M columns."""

    def prune_best(self, first: int, last: int, kept: int, scope: str) -> bool:
        """Keep the best `kept` weights of each row (scope "row") or of all rows (scope "block"); False if that takes more launches."""

    def score(self, first: int, last: int, origin: int, delta: torch.Tensor, scores: torch.Tensor) -> None:
        """What removing each weight would cost if nothing from column `origin` on is pruned. `delta` and `scores` begin with that
        column; `delta` goes from what is pending to the change of each weight."""


def sweep(make_kernels, weight, factor, *, n, m, sparsity, scope, block_size, mask):
    """`obs_sweep` with `make_kernels(sweep)`; the other arguments and the results are those of the reference."""
    rows, columns = weight.shape
    if mask is not None:
        n = m = 0
    elif not m and scope == "matrix":
        mask = _best_of_matrix(weight, factor, rows * columns - pruned_count(rows * columns, sparsity))
    competing = mask is None and not m
    state = _allocate(weight, factor, mask, column_blocks(columns, block_size_for(m, block_size, competing), ALIGNMENT))
    if weight.numel():
        kernels = make_kernels(state)
        if values_are_checked(weight):
            kernels.check_values()

        def run(i: int) -> None:
            block = state.blocks[i]
            if competing:
                _prune_best(state, kernels, block, rows if scope == "block" else 1, sparsity)
            else:
                kernels.prune(block.first, block.last, n, m)

        borders = [0, *(block.border for block in state.blocks)]
        state.delta[:, : borders[1]].zero_()
        with full_float32():
            by_halves(len(state.blocks), run, _product(state.delta, state.factor, borders, fresh=True))
        raise_if(state.status)
    return _results(state)


def _product(delta: torch.Tensor, factor: torch.Tensor, borders: list[int], fresh: bool) -> Callable[[int, int, int], None]:
    """The `update` of `by_halves` for tiles that begin and end at `borders` of the factor; `delta` begins with the first of them."""
    origin = borders[0]

    def update(first: int, middle: int, last: int) -> None:
        a, b, c = borders[first], borders[middle], borders[last]
        # Where nothing is pending yet, updates from the first tile on are the first to reach their columns.
        begins = fresh and first == 0
        add_product(delta[:, b - origin : c - origin], delta[:, a - origin : b - origin], factor[a:b, b:c], begins)

    return update


def _prune_best(state: Sweep, kernels: Kernels, block: Block, together: int, sparsity: float) -> None:
    """A block of any width, of which the best weights of `together` rows are kept: all, or each row by itself."""
    # Counting the pruned weights up to each border makes the total exact whatever the block size.
    pruned = pruned_count(together * block.end, sparsity) - pruned_count(together * block.begin, sparsity)
    kept, scope = together * (block.end - block.begin) - pruned, "row" if together == 1 else "block"
    if block.last - block.first <= LAUNCH_COLUMNS and kernels.prune_best(block.first, block.last, kept, scope):
        return
    borders = [*range(block.first, block.last, LAUNCH_COLUMNS), block.last]
    tiles = len(borders) - 1
    delta = state.delta[:, block.first : block.border].contiguous()
    scores = torch.empty_like(delta)
    by_halves(
        tiles,
        lambda i: kernels.score(borders[i], borders[i + 1], block.first, delta, scores),
        _product(delta, state.factor, borders, fresh=False),
    )
    columns = slice(block.first, block.last)
    state.mask[:, columns] = _keep_best(scores[:, : block.last - block.first], kept, "row" if scope == "row" else "matrix")
    by_halves(
        tiles,
        lambda i: kernels.prune(borders[i], borders[i + 1], 0, 0),
        _product(state.delta[:, columns], state.factor, borders, fresh=False),
    )


def _best_of_matrix(weight: torch.Tensor, factor: torch.Tensor, kept: int) -> torch.Tensor:
    """Chosen from the starting weights."""
    diagonal = factor.diagonal()
    return _keep_best(weight.abs() * torch.where(torch.signbit(diagonal), 0.0, diagonal), kept, "matrix")


def _keep_best(scores: torch.Tensor, kept: int, scope: str) -> torch.Tensor:
    with value_checks(False):  # a NaN comes from one in the weight or the factor, for which there is the status
        return torch.ops.sparsekern.topk_mask(scores, kept, scope=scope)


def _positions(blocks: list[Block], device: torch.device) -> torch.Tensor | None:
    """Where the sweep has the columns of the weight; None where it has them as they are."""
    if not blocks or blocks[-1].border == blocks[-1].end:
        return None
    return torch.cat([torch.arange(block.first, block.last, device=device) for block in blocks])


def _allocate(weight: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor | None, blocks: list[Block]) -> Sweep:
    columns = _positions(blocks, weight.device)
    if columns is None:
        weight, factor = _aligned(weight), _aligned(factor)
        chosen = torch.empty_like(weight, dtype=torch.bool) if mask is None else mask.clone(memory_format=torch.contiguous_format)
    else:
        width = blocks[-1].border
        weight = weight.new_zeros((len(weight), width)).index_copy_(1, columns, weight)
        dead = torch.diag(factor.new_full((width,), -1.0))
        factor = dead.index_put_((columns[:, None], columns), factor)
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        if mask is not None:
            chosen.index_copy_(1, columns, mask)
    return Sweep(
        blocks,
        weight,
        factor,
        chosen,
        delta=torch.empty_like(weight, dtype=torch.float32),
        new_weight=torch.empty_like(weight),
        row_error=weight.new_zeros(len(weight), dtype=torch.float32),
        status=weight.new_zeros((), dtype=torch.int32),
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _results(state: Sweep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = _positions(state.blocks, state.weight.device)
    if columns is None:
        return state.new_weight, state.mask, state.row_error
    return state.new_weight[:, columns], state.mask[:, columns], state.row_error


class CudaKernels:
    """csrc/cuda/obs_sweep.cu."""

    CALLS = 64  # of prune_best, that one clearing of the workspace serves

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
        if self._workspace is None:
            calls = min(self.CALLS, len(self._state.blocks))
            *self._workspace, self._tiles = self._ops.obs_sweep_workspace(self._state.weight, calls)
        if self._tiles == 0:
            return False
        cleared, shared = self._workspace
        if self._calls == len(cleared):
            cleared.zero_()
            self._calls = 0
        state = self._state
        self._ops.obs_sweep_competing_block(
            state.weight, state.factor, *self._results, cleared, shared, first, last, kept, self._tiles, self._calls
        )
        self._calls += 1
        return True

    def score(self, first: int, last: int, origin: int, delta: torch.Tensor, scores: torch.Tensor) -> None:
        state = self._state
        self._ops.obs_sweep_scores(state.weight, state.factor, delta, scores, state.status, first, last, origin, self._warps)

    def _prune(self, first: int, last: int, choice: str, kept: int, group: int) -> None:
        state = self._state
        self._ops.obs_sweep_block(state.weight, state.factor, *self._results, first, last, choice, kept, group, self._warps)


ROWS_PER_WARP = 4
MAX_WARPS = 8


def warps_for(rows: int, processors: int) -> int:
    """Warps of a thread block. Each block reads a whole triangle of the factor, so blocks are large, but not so large that half of
    the multiprocessors have none."""
    warps = MAX_WARPS
    while warps > 1 and 2 * -(-rows // (ROWS_PER_WARP * warps)) <= processors:
        warps //= 2
    return warps


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _supports(weight, factor, *, n=0, m=0, mask=None, **options) -> Support:
    if mask is None and m > MAX_GROUP:
        return Support(False, f"m is {m}, more than {MAX_GROUP}")
    if mask is None and m and weight.shape[1] % m:
        return Support(False, f"the input features, {weight.shape[1]}, are not divisible by {m}")
    return YES


def _cuda(weight, factor, *, n=0, m=0, sparsity=0.0, scope="block", block_size=128, mask=None):
    return sweep(CudaKernels, weight, factor, n=n, m=m, sparsity=sparsity, scope=scope, block_size=block_size, mask=mask)


def _triton(weight, factor, *, n=0, m=0, sparsity=0.0, scope="block", block_size=128, mask=None):
    from ..triton_kernels.obs_sweep import TritonKernels

    return sweep(TritonKernels, weight, factor, n=n, m=m, sparsity=sparsity, scope=scope, block_size=block_size, mask=mask)


IMPLEMENTATIONS = (Implementation("cuda", _cuda, _supports), Implementation("triton", _triton, _supports))
