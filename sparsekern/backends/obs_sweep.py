"""`obs_sweep` on a CUDA device: the loop over blocks of columns. Kernels do the work inside a block, in one launch each.

With `delta = weight - new_weight`, a block that begins at column `a` needs `delta[:, :a] @ factor[:a, block]`, and nothing else of the
columns before it. Computed block by block, that product is long and thin: 128 columns of results have tiles for only a quarter of the
multiprocessors. It is therefore computed by halves. As soon as the left half of a range of columns is finished, one product adds its effect
on the whole right half. Each block still waits for one product and its kernel, but three quarters of the arithmetic is in products at least
1024 columns wide. Pending sums are stored in `delta` itself, in the columns that will overwrite them.

The weights of a batch go through the blocks together: each product and each launch is one for all of them.

Where a call takes several blocks, it loops over them by itself, small products included. By count the host would take longer to launch them
than the device to compute them; nothing of this has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from ..pattern import pruned_count
from .devices import YES, Support
from .implementation import Implementation
from .products import add_product, full_float32
from .sweep_kernels import CudaKernels
from .sweep_state import ALIGNMENT, LAUNCH_COLUMNS, Block, Sweep, allocate, column_blocks, results
from .values import raise_if, value_checks, values_are_checked

MAX_GROUP = 64


def block_size_for(m: int, block_size: int, competing: bool) -> int:
    """Return the columns of a block: the caller's size if columns compete, else the whole groups of `m` that fit in a launch."""
    if competing:
        return block_size
    aligned = math.lcm(m or 1, ALIGNMENT)
    return LAUNCH_COLUMNS // aligned * aligned or LAUNCH_COLUMNS // m * m


def by_halves(count: int, run: Callable[[int, int], None], update: Callable[[int, int, int], None], together: int = 1) -> None:
    """Call `run(first, last)` for ranges that follow each other, of at most `together` numbers, with updates in between.

    `update(first, middle, last)` is called when all of `[first, middle)` has run and none of `[middle, last)` has. Each pair that is not
    in one range is updated once: with one number a range in `count - 1` updates, one before each `run` except the first.
    """

    def part(first: int, last: int) -> None:
        if last - first <= together:
            return run(first, last)
        middle = first + (1 << (last - first - 1).bit_length() - 1)
        part(first, middle)
        update(first, middle, last)
        part(middle, last)

    part(0, count)


class Kernels(Protocol):
    """The kernels of a sweep: each call is one launch for at most `LAUNCH_COLUMNS` columns `[first, last)` of a block."""

    def check_values(self) -> None:
        """Set the status if the factor has a NaN or Inf. The other functions may check the weight."""

    def prune(self, first: int, last: int, n: int, m: int) -> None:
        """Prune to the mask of the sweep, or with `m` to N of every M columns."""

    def prune_best(self, first: int, last: int, kept: int, scope: str) -> bool:
        """Keep the best `kept` weights of each row (scope "row") or of all rows (scope "block"); False if that takes more launches."""

    def together(self, choice: str) -> int:
        """Return the number of blocks that `prune_blocks` takes, a power of two. For one, `prune_blocks` is not called."""

    def prune_blocks(self, blocks: list[Block], kept: list[int], choice: str, m: int) -> None:
        """Prune neighbouring blocks, and add the effect of each on those after it.

        `choice` is "given" (the mask of the sweep), "group" (N of every M columns), or the scope in which the columns of a block
        compete; `kept` is what is kept there.
        """

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
    state = allocate(weight, factor, mask, column_blocks(columns, block_size_for(m, block_size, competing), ALIGNMENT))
    if weight.numel():
        kernels = make_kernels(state)
        if values_are_checked(weight):
            kernels.check_values()

        together = rows if scope == "block" else 1  # rows that are selected among
        choice = scope if competing else "group" if m else "given"

        def run(first: int, last: int) -> None:
            blocks = state.blocks[first:last]
            kept = [_kept(block, together, sparsity) if competing else n for block in blocks]
            if len(blocks) > 1:
                kernels.prune_blocks(blocks, kept, choice, m)
            elif competing:
                _prune_best(state, kernels, blocks[0], kept[0], scope)
            else:
                kernels.prune(blocks[0].first, blocks[0].last, n, m)

        borders = [0, *(block.border for block in state.blocks)]
        state.delta[..., : borders[1]].zero_()
        with full_float32():
            fit = state.blocks[0].last <= LAUNCH_COLUMNS
            by_halves(
                len(state.blocks),
                run,
                _product(state.delta, state.factor, borders, fresh=True),
                kernels.together(choice) if fit else 1,
            )
        raise_if(state.status)
    return results(state)


def _product(delta: torch.Tensor, factor: torch.Tensor, borders: list[int], fresh: bool) -> Callable[[int, int, int], None]:
    """Return the `update` of `by_halves` for tiles between `borders` of the factor; `delta` begins with the first border."""
    origin = borders[0]

    def update(first: int, middle: int, last: int) -> None:
        a, b, c = borders[first], borders[middle], borders[last]
        # If nothing is pending yet, updates from the first tile on are the first to write their columns.
        begins = fresh and first == 0
        add_product(delta[..., b - origin : c - origin], delta[..., a - origin : b - origin], factor[..., a:b, b:c], begins)

    return update


def _kept(block: Block, together: int, sparsity: float) -> int:
    """Return how many weights of a block are kept among `together` rows."""
    # Counting the pruned weights up to each border makes the total exact whatever the block size.
    pruned = pruned_count(together * block.end, sparsity) - pruned_count(together * block.begin, sparsity)
    return together * (block.end - block.begin) - pruned


def _prune_best(state: Sweep, kernels: Kernels, block: Block, kept: int, scope: str) -> None:
    """Prune a block of any width to its `kept` best weights of each row (scope "row") or of all rows (scope "block")."""
    if block.last - block.first <= LAUNCH_COLUMNS and kernels.prune_best(block.first, block.last, kept, scope):
        return
    borders = [*range(block.first, block.last, LAUNCH_COLUMNS), block.last]
    tiles = len(borders) - 1
    delta = state.delta[..., block.first : block.border].contiguous()
    scores = torch.empty_like(delta)
    by_halves(
        tiles,
        lambda i, _: kernels.score(borders[i], borders[i + 1], block.first, delta, scores),
        _product(delta, state.factor, borders, fresh=False),
    )
    columns = slice(block.first, block.last)
    state.mask[..., columns] = _keep_best(scores[..., : block.last - block.first], kept, "row" if scope == "row" else "matrix")
    by_halves(
        tiles,
        lambda i, _: kernels.prune(borders[i], borders[i + 1], 0, 0),
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
