"""The output folder of a run of several ranks. The first rank writes and reads it, and passes on what it read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..models import Linear
from ..models.stored_files import Part
from ..models.streaming import Stream, stream_of
from ..models.weight_files import weight_files
from ..ranks import World
from ..reports.report import LayerReport
from ..runtime.streamed import made_part
from .checkpoint import Checkpoint, ReportLike, StreamedCheckpoint
from .run import BlockResult


@dataclass(frozen=True)
class StreamedBlocks:
    """How all ranks read the finished blocks of a streamed model from the output folder, which all of them see.

    Attributes:
        model: the model.
        stream: its stream.
        out: the output folder.
        settings: everything that the result depends on.
        format: the format that the blocks are written in.
    """

    model: nn.Module
    stream: Stream
    out: Path
    settings: dict
    format: str

    def read_only(self, stage: str) -> StreamedCheckpoint:
        """Return the checkpoint of the first rank for another one.

        Raises:
            ValueError: the rank does not see the folder.
        """
        found = Checkpoint.read_only(self.out, self.settings)
        return self.of(found.for_stage(stage) if stage else found)

    def of(self, checkpoint: Checkpoint) -> StreamedCheckpoint:
        """Return the same checkpoint, from which the model reads finished blocks."""
        return StreamedCheckpoint(checkpoint, self.model, self.stream, self.format)


class SharedBlocks:
    """The checkpoint of the first rank, to which all ranks refer in the same order. See `Blocks`."""

    def __init__(
        self,
        world: World,
        own: Checkpoint | None,
        count: int,
        streamed: StreamedBlocks | None = None,
        *,
        stage: str = "",
        writes: bool = True,
    ) -> None:
        """Tell all ranks which blocks are finished.

        Args:
            world: the ranks.
            own: the checkpoint, on the first rank; None on the others.
            count: the number of blocks, one more for the linears outside them.
            streamed: how the ranks read finished blocks of a streamed model; None for a model in memory.
            stage: the stage of the checkpoint, see `Checkpoint.for_stage`.
            writes: False if this stage leaves the blocks as they are, so that a streamed model reads none from it.
        """
        self._world, self._own, self._count, self._streamed = world, own, count, streamed
        finished = [] if own is None else [index for index in range(count) if own.holds(index)]
        self._finished = set(world.from_first("finished blocks", finished))
        self._new: list[int] = []
        self._followed = streamed.read_only(stage) if streamed is not None and writes and own is None else None
        world.agree("followed")  # the first rank writes no block before all others have seen which were there

    def save(self, index: int, result: BlockResult) -> None:
        """Keep the result of block `index`, which is the same on all ranks."""
        if self._own is not None:
            self._own.save(index, result)
        self._world.agree(f"save {index}")
        self._finished.add(index)
        self._new.append(index)

    def finish(self) -> None:
        """Wait on the first rank until all results are on disk."""
        if self._own is not None:
            self._own.finish()

    def follow(self) -> None:
        """Let a streamed model read the finished blocks on all ranks, once `finish` has returned. All ranks call this."""
        self._world.agree("on disk")
        if self._followed is not None:
            for index in self._new:
                self._followed.follow(index)

    def as_before(self, index: int) -> AbstractContextManager[object]:
        """Let a streamed model read block `index` within as it was in front of the run."""
        found = self._followed if self._own is None else self._own
        return nullcontext() if found is None else found.as_before(index)

    def put_back(self, index: int) -> None:
        """Let a streamed model read block `index` as it was in front of the run, until it is pruned again."""
        found = self._followed if self._own is None else self._own
        if found is not None:
            found.put_back(index)

    def holds(self, index: int) -> bool:
        """Return whether block `index` is finished."""
        return index in self._finished

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the result of block `index`, or None where it is not finished."""
        if index not in self._finished:
            return None
        found = None if self._own is None else self._own.load(index, linears)
        told = None
        if found is not None:
            others = {name: [_name(tensor.dtype), list(tensor.shape)] for name, tensor in found.others.items()}
            told = {"layers": [asdict(layer) for layer in found.layers], "others": others, "tuning": found.tuning}
        told = self._world.from_first(f"load {index}", told)
        if found is None:
            weights = {linear.name: torch.empty_like(linear.weight) for linear in linears}
            device = linears[0].weight.device
            specs = told["others"].items()
            other = {name: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for name, (dtype, shape) in specs}
        else:
            weights, other = dict(found.weights), dict(found.others)
        for tensors, names in ((weights, [linear.name for linear in linears]), (other, list(told["others"]))):
            for name in names:  # in the same order on all ranks
                tensors[name] = tensors[name].contiguous()
                self._world.broadcast(tensors[name], 0)
        layers = [LayerReport.from_dict(layer) for layer in told["layers"]]
        return BlockResult(weights, layers, others=other, tuning=told["tuning"])

    def for_stage(self, stage: str) -> SharedBlocks:
        """Return the blocks of a method that runs after the first one, see `Checkpoint.for_stage`. All ranks call this."""
        own = None if self._own is None else self._own.for_stage(stage)
        if own is not None and self._streamed is not None:
            own = self._streamed.of(own)
        return SharedBlocks(self._world, own, self._count + 1, self._streamed, stage=stage)

    def read(
        self, index: int, make_report: Callable[[dict], ReportLike]
    ) -> tuple[dict[str, torch.Tensor], list[ReportLike]] | None:
        """Return what `Checkpoint.read` returns on the first rank. Its tensors are small."""
        if index not in self._finished:
            return None
        found = None if self._own is None else self._own.read(index, lambda layer: layer)
        told = None
        if found is not None:
            tensors, layers = found
            kinds = {name: _name(tensor.dtype) for name, tensor in tensors.items()}
            told = [{name: [kinds[name], tensor.tolist()] for name, tensor in tensors.items()}, layers]
        told_tensors, told_layers = self._world.from_first(f"read {index}", told)
        same = {name: torch.tensor(values, dtype=getattr(torch, kind)) for name, (kind, values) in told_tensors.items()}
        return same, [make_report(layer) for layer in told_layers]

    def damaged(self, index: int, reason: object) -> ValueError:
        """Return the error for a damaged entry."""
        return ValueError(f"block {index}: {reason}") if self._own is None else self._own.damaged(index, reason)

    def drop_unused(self) -> None:
        """Remove the checkpoint from its output folder unless it holds a finished block."""
        if self._own is not None:
            self._own.drop_unused()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shared_blocks(
    world: World,
    own: Checkpoint | None,
    count: int,
    model: nn.Module,
    out: Path,
    settings: dict,
    format: str,
    *,
    writes: bool = True,
) -> SharedBlocks:
    """Return the finished blocks of a run for this rank. All ranks call this.

    Args:
        world: the ranks.
        own: the checkpoint, on the first rank; None on the others.
        count: the number of blocks, one more for the linears outside them.
        model: the model.
        out: the output folder, which all ranks must see if the model is streamed.
        settings: everything that the result depends on.
        format: the format that the blocks of a streamed model are written in.
        writes: False if the method itself leaves the blocks as they are.

    Raises:
        ValueError: the model is streamed, and a rank does not see the folder.
    """
    stream = stream_of(model)
    streamed = None if stream is None else StreamedBlocks(model, stream, out, settings, format)
    return SharedBlocks(world, own, count, streamed, writes=writes)


def follow_written(world: World, model: nn.Module, out: Path, parts: Sequence[Part] | None) -> None:
    """Let a streamed model read the finished folder on all ranks. All ranks call this.

    Args:
        world: the ranks.
        model: the model.
        out: the folder.
        parts: what the first rank has written in another form, see `RunFolder.write`; None on the others.
    """
    stream = stream_of(model)
    if world.size == 1 or stream is None:
        return
    told = [[part.index, part.names, part.format, part.packed, part.replaced] for part in parts or ()]
    told = world.from_first("written", told)
    if not world.leads:
        stream.take_all(weight_files(out), [made_part(*part) for part in told])
