"""The problem that a `BlockMethod` solves: a block's feed-forward network, found by a probe, and its inputs.

The inputs, and the numbers that the method keeps for each token, are stored in nameless files that are mapped into memory. They are
read and written back one tile at a time. The system keeps in memory as much as fits, and a killed run leaves nothing behind. The files
hold (inputs + outputs + one or two hidden widths) numbers a token for one block at a time, in the model's dtype.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import IO, cast

import torch
from torch import nn

from ...methods.base import BlockMethod
from ...methods.network import FeedForwardProblem, FeedForwardSolution, Layer, Sums
from ...methods.statistics import Gram, InputStatistic
from ...models import FeedForward, Linear, LinearCall, find_feed_forwards, find_linears
from ...models.experts import ExpertLinear
from ...ranks.sums import total_of_leaves
from ..batches import TOKENS, Batch
from ..plan import Plan
from .shares import Share
from .trace import forward

PROBE_ROWS = 8
TILE = 2048  # tokens worked on at once: enough for the matrix products to run at full speed


def networks_of(model: nn.Module, plan: Plan, batch: Batch, method: BlockMethod) -> list[FeedForward | None]:
    """Return the feed-forward network of each block; None where none of its linears are pruned, and where all are fused experts.

    Raises:
        ValueError: a block without exactly one network of a known form, or a network of which only a part is pruned.
    """
    blocks = plan.blocks
    chosen = {linear.name: linear for linear in plan.linears}
    networks: list[FeedForward | None] = []
    for index, found in enumerate(_watch(model, plan, batch)):
        fused = any(isinstance(linear.modules[0], ExpertLinear) for linear in find_linears(blocks.modules[index]))
        if plan.block_linears[index] and len(found) != 1 and not (fused and not found):
            raise ValueError(
                f"{blocks.block_name(index)}: {type(method).__name__} needs one feed-forward network a block, of the form "
                "down(act(up(x))) or down(act(gate(x)) * up(x)) with ReLU, SiLU or GELU and a linear for each projection; "
                f"{'found several' if found else 'found none'} in {type(blocks.modules[index]).__name__}"
            )
        names = [linear.name for linear in found[0].linears] if found else []
        pruned = [name for name in names if name in chosen]
        if pruned and len(pruned) < len(names):
            raise ValueError(
                f"include, exclude, patterns: {type(method).__name__} prunes {', '.join(names)} together, "
                f"but {next(name for name in names if name not in chosen)} is left out"
            )
        networks.append(_with(found[0], chosen) if pruned else None)
    return networks


def _with(network: FeedForward, chosen: Mapping[str, Linear]) -> FeedForward:
    """Return the same network with the plan's own linears."""
    gate = None if network.gate is None else chosen[network.gate.name]
    return FeedForward(chosen[network.up.name], gate, chosen[network.down.name], network.activation)


def _watch(model: nn.Module, plan: Plan, batch: Batch) -> list[list[FeedForward]]:
    """Return the feed-forward networks of each block of which linears are pruned, from a forward of one sample.

    Of each call of a linear only the first few rows are compared, and only while their block runs.
    """
    networks: list[list[FeedForward]] = [[] for _ in plan.block_linears]

    def keep(found: list[LinearCall]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if isinstance(output, torch.Tensor):  # Llama 4's router, a subclass, returns a tuple
                found.append(LinearCall(_first_rows(args[0] if args else kwargs["input"]), _first_rows(output)))

        return hook

    def finish(index: int, calls: Mapping[Linear, list[LinearCall]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            networks[index] = find_feed_forwards({linear: found[0] for linear, found in calls.items() if len(found) == 1})
            for found in calls.values():
                found.clear()

        return hook

    with ExitStack() as stack:
        for index, block in enumerate(plan.blocks.modules):
            if plan.block_linears[index]:
                calls: dict[Linear, list[LinearCall]] = {
                    linear: [] for linear in find_linears(block, plan.blocks.block_name(index))
                }
                stack.callback(block.register_forward_hook(finish(index, calls)).remove)
                for linear, found in calls.items():
                    for module in linear.modules:
                        stack.callback(module.register_forward_hook(keep(found), with_kwargs=True).remove)
        forward(model, batch.first_sample_alone() or batch.inputs)
    return networks


def _first_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])[:PROBE_ROWS]


class MappedRows:
    """A matrix `[tokens, width]` of `dtype` in a nameless file. `read` and `write` convert to and from float32 on `device`."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        size = tokens * width * dtype.itemsize
        with tempfile.NamedTemporaryFile(prefix="sparsekern-") as file:
            _reserve(file, max(size, dtype.itemsize))
            whole = torch.from_file(file.name, shared=True, size=max(tokens * width, 1), dtype=dtype)
        self._rows = whole[: tokens * width].view(tokens, width)
        self._device = device

    def read(self, rows: slice) -> torch.Tensor:
        """Return `rows` in float32."""
        return self._rows[rows].to(self._device).float()

    def write(self, rows: slice, values: torch.Tensor) -> None:
        """Replace `rows` by `values`, rounded to the dtype of the file."""
        self._rows[rows].copy_(values)

    def copy_(self, fewer: MappedRows) -> None:
        """Copy all rows of a smaller matrix to the first rows."""
        self._rows[: len(fewer._rows)].copy_(fewer._rows)


def _reserve(file: IO, size: int) -> None:
    """Allocate the space on disk, so that a full disk is an error here rather than a fault later."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        message = (
            f"{error.strerror}: {file.name} needs {size:,} bytes for the activations of one block (TMPDIR names another folder)"
        )
        raise OSError(error.errno, message) from error


class FeedForwardRun:
    """The feed-forward network of one block. It gathers the network's inputs batch by batch, and solves it by a method.

    Each process keeps the tokens of its own batches. Sums over tokens are taken leaf by leaf, and added in the tree of `TreeSum`.
    """

    def __init__(
        self, network: FeedForward, method: BlockMethod, plan: Plan, share: Share, tokens: int, mask: str | None = TOKENS
    ) -> None:
        """Make room for the inputs.

        Args:
            network: the network.
            method: solves it.
            plan: gives each linear its pattern.
            share: the batches of this process.
            tokens: the number of tokens that `add` is expected to get.
            mask: the padding mask that the network's inputs follow, see `Batch.flatten`.
        """
        self.network, self._method, self._plan, self._tokens, self._seen = network, method, plan, tokens, 0
        self._mask, self._share = mask, share
        self._ends = dict.fromkeys(share.leaves, 0)  # how many tokens were seen after each leaf
        self._x = self._new_rows(network.up.features)

    def add(self, batch: Batch, inputs: Sequence[torch.Tensor]) -> None:
        """Add the inputs of the up projection in `batch`, without padding. The batches of a leaf follow one another."""
        for x in inputs:
            rows, row_mask = batch.flatten(x, self._mask)
            rows = rows if row_mask is None else rows[row_mask]
            seen = self._seen + len(rows)
            if seen > self._tokens:  # the rows of images and decoders are not known beforehand
                self._tokens, fewer = max(seen, 2 * self._tokens), self._x
                self._x = self._new_rows(self.network.up.features)
                self._x.copy_(fewer)
            self._x.write(slice(self._seen, seen), rows)
            self._seen = seen
        self._ends[self._share.leaf_of(batch)] = self._seen

    def solve(self, statistics: Mapping[str, InputStatistic]) -> tuple[dict[str, torch.Tensor], FeedForwardSolution]:
        """Return the new weights by name, and the solution.

        Args:
            statistics: the statistic of each linear's dense inputs, by name.
        """
        network = self.network
        problem = FeedForwardProblem(
            self._layer(network.up),
            None if network.gate is None else self._layer(network.gate),
            self._layer(network.down),
            network.activation,
            cast(Gram, statistics[network.up.name]),  # a `BlockMethod` needs Gram matrices
            cast(Gram, statistics[network.down.name]),
            self._x,
            self._new_rows,
            self._over_tokens,
        )
        solution = self._method.solve_feed_forward(problem)
        named = ((network.up, solution.up), (network.gate, solution.gate), (network.down, solution.down))
        return {linear.name: weight for linear, weight in named if linear is not None and weight is not None}, solution

    def _over_tokens(self, sums_of: Callable[[Iterable[slice]], Sums]) -> Sums:
        """Return the sums over the tokens of all processes, see `FeedForwardProblem.over_tokens`."""
        ends = list(accumulate(self._ends.values(), max))  # a leaf without batches has no tokens
        leaves = (sums_of(self._tiles(*borders)) for borders in pairwise([0, *ends]))
        return total_of_leaves(self._share.world, leaves, lambda earlier, later: earlier.plus(later), lambda sums: sums.tensors())

    def _tiles(self, begin: int, end: int) -> Iterator[slice]:
        for start in range(begin, end, TILE):
            self._share.world.check()
            yield slice(start, min(start + TILE, end))

    def _layer(self, linear: Linear) -> Layer:
        return Layer(linear.weight, linear.bias, self._plan.patterns[linear.name])

    def _new_rows(self, width: int) -> MappedRows:
        weight = self.network.up.weight
        return MappedRows(self._tokens, width, weight.dtype, weight.device)
