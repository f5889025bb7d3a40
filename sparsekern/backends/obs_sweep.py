"""`obs_sweep` on a CUDA device: the loop over blocks of columns. Kernels do the work inside a block, in one launch each.

With `delta = weight - new_weight`, a block that begins at column `a` needs `delta[:, :a] @ factor[:a, block]`, and nothing else of the
columns before it. Computed block by block, that product is long and thin: 128 columns of results have tiles for only a quarter of the
multiprocessors. It is therefore computed by halves. As soon as the left half of a range of columns is finished, one product adds its effect
on the whole right half. Each block still waits for one product and its kernel, but three quarters of the arithmetic is in products at least
1024 columns wide. Pending sums are stored in `delta` itself, in the columns that will overwrite them.

The weights of a batch go through the blocks together: each product and each launch is one for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..pattern import pruned_count
from .devices import YES, Support
from .implementation import Implementation
from .products import add_product, full_float32
from .values import raise_if, value_checks, values_are_checked

LAUNCH_COLUMNS = 128  # most columns of one launch
MAX_GROUP = 64
ALIGNMENT = 4  # columns; blocks of the CUDA C++ kernels begin at multiples of it


class Block(NamedTuple):
    """Columns of a block: `[begin, end)` of the weight, stored at `[first, last)` of the sweep's matrices.

    Attributes:
        begin: first column in the weight.
        end: end of the columns in the weight, exclusive.
        first: first column in the sweep's matrices.
        last: end of the columns in the sweep's matrices, exclusive.
        border: end of the padding, where the next block begins.
    """

    begin: int
    end: int
    first: int
    last: int
    border: int


def block_size_for(m: int, block_size: int, competing: bool) -> int:
    """Return the columns of a block: the caller's size if columns compete, else the whole groups of `m` that fit in a launch."""
    if competing:
        return block_size
    aligned = math.lcm(m or 1, ALIGNMENT)
    return LAUNCH_COLUMNS // aligned * aligned or LAUNCH_COLUMNS // m * m


def column_blocks(columns: int, size: int, alignment: int) -> list[Block]:
    """Return blocks of `size` columns, each beginning at a multiple of `alignment` columns of the sweep's matrices."""
    blocks, first = [], 0
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        last = first + end - begin
        blocks.append(Block(begin, end, first, last, -(-last // alignment) * alignment))
        first = blocks[-1].border
    return blocks


def by_halves(count: int, run: Callable[[int], None], update: Callable[[int, int, int], None]) -> None:
    """Call `run(i)` for each `i` in order, with updates in between.

    `update(first, middle, last)` is called when all of `[first, middle)` has run and none of `[middle, last)` has. Each pair is updated
    once, in `count - 1` updates, one before each `run` except the first.
    """

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
    """The tensors of one sweep, contiguous and aligned to 16 bytes. Columns are where `blocks` say.

    All but `status` have a leading dimension more in the sweep of a batch.

    Attributes:
        blocks: the blocks of columns.
        weight: `[rows, columns]`.
        factor: `[columns, columns]` float32; padding is dead features.
        mask: `[rows, columns]` bool, given or found block by block.
        delta: `[rows, columns]` float32, `weight - new_weight`; pending sums in later columns.
        new_weight: `[rows, columns]` in the dtype of `weight`.
        row_error: `[rows]` float32.
        status: int32 scalar on the device.
    """

    blocks: list[Block]
    weight: torch.Tensor
    factor: torch.Tensor
    mask: torch.Tensor
    delta: torch.Tensor
    new_weight: torch.Tensor
    row_error: torch.Tensor
    status: torch.Tensor


class Kernels(Protocol):
    """The kernels of a sweep: each call is one launch for at most `LAUNCH_COLUMNS` columns `[first, last)` of a block."""

    def check_values(self) -> None:
        """Set the status if the factor has a NaN or Inf. The other functions may check the weight."""

    def prune(self, first: int, last: int, n: int, m: int) -> None:
        """Prune to the mask of the sweep, or with `m` to N of every M columns."""

    def prune_best(self, first: int, last: int, kept: int, scope: str) -> bool:
        """Keep the best `kept` weights of each row (scope "row") or of all rows (scope "block"); False if that takes more launches."""

    def score(self, first: int, last: int, origin: int, delta: torch.Tensor, scores: torch.Tensor) -> None:
        """Store the cost of removing each weight if nothing from column `origin` on is pruned.

        `delta` and `scores` begin with column `origin`. `delta` holds the pending sums on entry and the change of each weight on return.
        """


def sweep(make_kernels, weight, factor, *, n, m, sparsity, scope, block_size, mask):
    """Run `obs_sweep` with `make_kernels(sweep)`; the other arguments and the results are those of the reference."""
    *_, rows, columns = weight.shape
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
        state.delta[..., : borders[1]].zero_()
        with full_float32():
            by_halves(len(state.blocks), run, _product(state.delta, state.factor, borders, fresh=True))
        raise_if(state.status)
    return _results(state)


def _product(delta: torch.Tensor, factor: torch.Tensor, borders: list[int], fresh: bool) -> Callable[[int, int, int], None]:
    """Return the `update` of `by_halves` for tiles between `borders` of the factor; `delta` begins with the first border."""
    origin = borders[0]

    def update(first: int, middle: int, last: int) -> None:
        a, b, c = borders[first], borders[middle], borders[last]
        # If nothing is pending yet, updates from the first tile on are the first to write their columns.
        begins = fresh and first == 0
        add_product(delta[..., b - origin : c - origin], delta[..., a - origin : b - origin], factor[..., a:b, b:c], begins)

    return update


def _prune_best(state: Sweep, kernels: Kernels, block: Block, together: int, sparsity: float) -> None:
    """Prune a block of any width to its best weights, selected among `together` rows: all rows, or each row separately."""
    # Counting the pruned weights up to each border makes the total exact whatever the block size.
    pruned = pruned_count(together * block.end, sparsity) - pruned_count(together * block.begin, sparsity)
    kept, scope = together * (block.end - block.begin) - pruned, "row" if together == 1 else "block"
    if block.last - block.first <= LAUNCH_COLUMNS and kernels.prune_best(block.first, block.last, kept, scope):
        return
    borders = [*range(block.first, block.last, LAUNCH_COLUMNS), block.last]
    tiles = len(borders) - 1
    delta = state.delta[..., block.first : block.border].contiguous()
    scores = torch.empty_like(delta)
    by_halves(
        tiles,
        lambda i: kernels.score(borders[i], borders[i + 1], block.first, delta, scores),
        _product(delta, state.factor, borders, fresh=False),
    )
    columns = slice(block.first, block.last)
    state.mask[..., columns] = _keep_best(scores[..., : block.last - block.first], kept, "row" if scope == "row" else "matrix")
    by_halves(
        tiles,
        lambda i: kernels.prune(borders[i], borders[i + 1], 0, 0),
        _product(state.delta[..., columns], state.factor, borders, fresh=False),
    )


def _best_of_matrix(weight: torch.Tensor, factor: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the mask of the best weights of the whole matrix, chosen from the initial weights."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    return _keep_best(weight.abs() * torch.where(torch.signbit(diagonal), 0.0, diagonal).unsqueeze(-2), kept, "matrix")


def _keep_best(scores: torch.Tensor, kept: int, scope: str) -> torch.Tensor:
    shape = scores.shape
    if len(shape) == 3:  # the matrices of a batch are rows that are selected from one by one
        scores, scope = scores.flatten(1) if scope == "matrix" else scores.flatten(0, 1), "row"
    with value_checks(False):  # a NaN comes from the weight or the factor, which the status reports
        return torch.ops.sparsekern.topk_mask(scores, kept, scope=scope).view(shape)


def _positions(blocks: list[Block], device: torch.device) -> torch.Tensor | None:
    """Return the column in the sweep of each column of the weight; None if they are the same."""
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
        weight = weight.new_zeros((*weight.shape[:-1], width)).index_copy_(-1, columns, weight)
        dead = torch.diag_embed(factor.new_full((*factor.shape[:-2], width), -1.0))
        dead[..., columns[:, None], columns] = factor
        factor = dead
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        if mask is not None:
            chosen.index_copy_(-1, columns, mask)
    return Sweep(
        blocks,
        weight,
        factor,
        chosen,
        delta=torch.empty_like(weight, dtype=torch.float32),
        new_weight=torch.empty_like(weight),
        row_error=weight.new_zeros(weight.shape[:-1], dtype=torch.float32),
        status=weight.new_zeros((), dtype=torch.int32),
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _results(state: Sweep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = _positions(state.blocks, state.weight.device)
    if columns is None:
        return state.new_weight, state.mask, state.row_error
    return state.new_weight[..., columns], state.mask[..., columns], state.row_error


class CudaKernels:
    """The kernels of csrc/cuda/obs_sweep.cu; see `Kernels`."""

    CALLS = 64  # calls of `prune_best` per clearing of the workspace

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
    """Return the warps of a thread block.

    Each block reads a whole triangle of the factor. Blocks are therefore large, unless half of the multiprocessors would have none.
    """
    warps = MAX_WARPS
    while warps > 1 and 2 * -(-rows // (ROWS_PER_WARP * warps)) <= processors:
        warps //= 2
    return warps


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _supports(weight, factor, *, n=0, m=0, mask=None, **options) -> Support:
    if mask is not None and m:
        return Support(False, "no implementation chooses N:M among the weights of a mask")
    if m > MAX_GROUP:
        return Support(False, f"m is {m}, more than {MAX_GROUP}")
    if m and weight.shape[-1] % m:
        return Support(False, f"the input features, {weight.shape[-1]}, are not divisible by {m}")
    return YES


def _cuda(weight, factor, *, n=0, m=0, sparsity=0.0, scope="block", block_size=128, mask=None):
    return sweep(CudaKernels, weight, factor, n=n, m=m, sparsity=sparsity, scope=scope, block_size=block_size, mask=mask)


def _triton(weight, factor, *, n=0, m=0, sparsity=0.0, scope="block", block_size=128, mask=None):
    from ..triton_kernels.obs_sweep import TritonKernels

    return sweep(TritonKernels, weight, factor, n=n, m=m, sparsity=sparsity, scope=scope, block_size=block_size, mask=mask)


def _supports_one(weight, factor, **options) -> Support:
    if weight.dim() == 3:
        return Support(False, "only the triton implementation takes a batch of weights")
    return _supports(weight, factor, **options)


IMPLEMENTATIONS = (Implementation("cuda", _cuda, _supports_one), Implementation("triton", _triton, _supports))
