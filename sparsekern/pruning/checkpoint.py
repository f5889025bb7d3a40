"""The finished blocks of a run on disk. A killed run loses at most its current block.

`OUT/checkpoint/state.json` names the run: it is written first and never changed. `block-00012.safetensors` holds the pruned weights of
one block, and in its header the reports of its layers and the digest of the run's settings. A resumed run takes the finished blocks
and recomputes only the hidden states behind them, so it continues with the same numbers.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .._files import is_temporary, write_atomically
from .._warnings import SparsekernWarning
from ..models import Linear, find_linears
from ..models.stored_files import Part, Place
from ..models.streaming import Stream
from ..models.zeros import count_block
from ..reports import schema
from ..reports.report import LayerReport
from ..runtime.streamed import made_part, stored_part
from .mixtures import DENSE
from .run import BlockResult
from .store import InFolder, check_finite_tensors, check_pruned, check_specs, digest_of

FOLDER = "checkpoint"
STATE = "state.json"
FORMAT = 2
TUNING = "block tuning"  # among the seconds of the layers, whose names have no blank
OTHERS = "others/"  # a prefix of the tensors that tuning changed besides the weights
NO_TENSOR = "\0"  # a prefix that no name has
REMEDY = "remove it to redo its part of the run"
ReportLike = TypeVar("ReportLike")


class Checkpoint:
    """The checkpoint of one run, in its output folder.

    Attributes:
        folder: the folder of the checkpoint.
        patterns: the pattern of each linear as text, by name.
        dense_allowed: True if experts that no token reached stay dense.
        run: the digest of the run's settings.
        store: the entries.
        stage: a prefix of the entries' names, for a run of two methods one after the other; empty for the first.
    """

    stage = ""

    def __init__(self, out: Path, settings: dict, environment: dict, *, resume: bool) -> None:
        """Start a checkpoint, or with `resume` continue the one in `out`, if there is one.

        Args:
            out: the output folder, whose lock the caller holds.
            settings: everything that the result depends on. A checkpoint of other settings is refused.
            environment: versions and threads. A difference is a warning, since rounding may differ.
            resume: continue an unfinished run.

        Raises:
            ValueError: `out` holds an unfinished run without `resume`, or the checkpoint of another run.
        """
        self.folder = out / FOLDER
        state = {"format": FORMAT, "settings": settings, "environment": environment}
        state = json.loads(json.dumps(state))  # as JSON returns it, with lists for tuples
        self.patterns: dict[str, str] = state["settings"].get("patterns", {})
        self.dense_allowed = state["settings"].get("unseen") == DENSE
        self.run = digest_of(state["settings"])
        if self.folder.exists() and not resume:
            raise ValueError(f"out: {out} holds an unfinished run; pass resume=True to continue it, or remove {self.folder}")
        is_new = not (self.folder / STATE).exists()
        if is_new and self.folder.exists() and not all(is_temporary(entry.name) for entry in self.folder.iterdir()):
            raise ValueError(f"out: {self.folder} holds no {STATE}, so it is not a checkpoint of a run; remove it to start over")
        self.store = InFolder(self.folder, "out", REMEDY)
        if is_new:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / STATE, json.dumps(state, indent=1).encode())
        else:
            self._check_state(state)

    @classmethod
    def read_only(cls, out: Path, settings: dict) -> Checkpoint:
        """Return the checkpoint in `out` that another process holds, to read the finished blocks of a run.

        Raises:
            ValueError: it is not visible here, or of a run with other settings.
        """
        folder = out / FOLDER
        if not (folder / STATE).exists():
            raise ValueError(
                f"out: expected a folder that all ranks see, from which a streamed model reads finished blocks; {folder} is not here"
            )
        self = cls.__new__(cls)
        state = json.loads(json.dumps(settings))
        self.folder, self.patterns, self.run = folder, state.get("patterns", {}), digest_of(state)
        self.dense_allowed = state.get("unseen") == DENSE
        self.store = InFolder(folder, "out", REMEDY, held=False)
        return self

    def drop_unused(self) -> None:
        """Remove the checkpoint from its output folder unless it holds a finished block."""
        if not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder)

    def for_stage(self, stage: str) -> Checkpoint:
        """Return the same checkpoint with entries of its own, for a method that runs after the first one."""
        other = copy.copy(self)
        other.stage = f"{stage}-"
        return other

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: dict[str, Any]) -> None:
        """Write an entry of this run."""
        self.store.put(name, tensors, {"run": self.run, **note})

    def get(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the tensors and the note of an entry, or None if there is no such entry.

        Raises:
            ValueError: the file is damaged, or of a run with other settings.
        """
        if not self.store.holds(name):
            return None
        tensors, note = self.store.get(name)
        self._check_note(name, note)
        return tensors, note

    def _check_note(self, name: str, note: Any) -> None:
        if not isinstance(note, dict) or "run" not in note:
            raise self.damaged(name, "its note is not that of a run")
        if note["run"] != self.run:
            raise ValueError(f"{self.store.place(name)} is of a run with other settings; {REMEDY}")

    def damaged(self, name: str | int, reason: object) -> ValueError:
        """Return the error for a damaged entry, which is given by name or by the index of its block."""
        name = self._name(name) if isinstance(name, int) else name
        return ValueError(f"{self.store.place(name)} is damaged ({reason}); {REMEDY}")

    def save(self, index: int, result: BlockResult) -> None:
        """Write the result of block `index`."""
        tuned = {} if result.tuning is None else {"tuning": result.tuning}
        tensors = {**result.weights, **{OTHERS + name: tensor for name, tensor in result.others.items()}}
        self.put(self._name(index), tensors, {"layers": [asdict(layer) for layer in result.layers], **tuned})

    def finish(self) -> None:
        """Do nothing: `save` returns once a block is on disk."""

    def as_before(self, index: int) -> AbstractContextManager[object]:
        """Do nothing within: a block in memory is as it was in front of the run until its result is written to it."""
        return nullcontext()

    def put_back(self, index: int) -> None:
        """Do nothing, as `as_before` does."""

    def holds(self, index: int) -> bool:
        """Return whether block `index` is finished."""
        return self.store.holds(self._name(index))

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the result of block `index`, or None where it is not finished.

        Raises:
            ValueError: the file is damaged or of another run; or it holds other linears, NaN, or weights that are not pruned to
                their pattern.
        """
        found = self.read(index, LayerReport.from_dict)
        if found is None:
            return None
        tensors, layers = found
        others = {name.removeprefix(OTHERS): tensor for name, tensor in tensors.items() if name.startswith(OTHERS)}
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)}
        try:
            place = self.store.place(self._name(index))
            check_specs(place, weights, linears)
            check_pruned(place, weights, layers, self.patterns, dense_allowed=self.dense_allowed)
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from error
        tuned = self.store.get(self._name(index), prefix=NO_TENSOR)[1].get("tuning")
        try:
            tuning = None if tuned is None else _tuning_row(tuned)
        except TypeError as error:
            raise self.damaged(index, error) from error
        return BlockResult(weights, layers, others=others, tuning=tuning)

    def read(
        self, index: int, make_report: Callable[[dict], ReportLike]
    ) -> tuple[dict[str, torch.Tensor], list[ReportLike]] | None:
        """Return the saved tensors and reports of block `index`, or None where it is not finished.

        Args:
            index: the number of the block.
            make_report: makes a report from the fields of its dataclass.

        Raises:
            ValueError: the file is damaged or of another run, or holds NaN or Inf.
        """
        found = self.get(self._name(index))
        if found is None:
            return None
        tensors, note = found
        try:
            check_finite_tensors(self.store.place(self._name(index)), tensors)
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from error
        try:
            return tensors, [make_report(layer) for layer in note["layers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(self._name(index), error) from error

    def _name(self, index: int) -> str:
        return f"{self.stage}block-{index:05d}"

    def _check_state(self, state: dict) -> None:
        path = self.folder / STATE
        try:
            found = json.loads(path.read_bytes())
            settings, environment, version = dict(found["settings"]), dict(found["environment"]), found["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {path} is not a checkpoint's state ({error}); remove {self.folder} to start over") from error
        if version != FORMAT:
            raise ValueError(f"out: {path} has format {version}, this version reads {FORMAT}; remove {self.folder} to start over")
        different = differences(settings, state["settings"])
        if different == ["leaves"]:
            leaves = settings.get("leaves", 1)
            raise ValueError(
                f"out: {self.folder} belongs to a run with leaves={leaves}; pass leaves={leaves} (--leaves {leaves}) to continue it "
                f"with {'one process' if leaves == 1 else f'up to {leaves} processes'}, or remove it to start over"
            )
        if different:
            raise ValueError(
                f"out: {self.folder} belongs to another run, with another {', '.join(different)}; "
                "call with the same model and settings, or remove it to start over"
            )
        if different := differences(environment, state["environment"]):
            warnings.warn(
                f"the run is resumed with another {', '.join(different)}; the result may differ in rounding from an unbroken run",
                SparsekernWarning,
                stacklevel=6,
            )


class StreamedCheckpoint(Checkpoint):
    """The checkpoint of a streamed run. It holds each finished block whole, as the output will hold it.

    The model reads finished blocks from here. They are written in the stream's thread for files, while the run goes on.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, stream: Stream, format: str) -> None:
        """Let the model read the finished blocks.

        Args:
            checkpoint: the same checkpoint, or a stage of it.
            model: the streamed model.
            stream: its stream.
            format: the format that the blocks are written in.

        Raises:
            ValueError: a finished block is damaged or of another run.
        """
        vars(self).update(vars(checkpoint))
        self._model, self._stream, self._format = model, stream, format
        self._writing: Future[None] | None = None
        self._before: dict[int, Place] = {}
        for index in range(len(stream.blocks)):
            if self.holds(index) and (place := self._take(index, self._read_note(index)[0])) is not None:
                self._before[index] = place

    def save(self, index: int, result: BlockResult) -> None:
        """Write block `index`, which is in memory, with the weights of `result`, or linears outside the blocks."""
        inside = index < len(self._stream.blocks)
        name = self._stream.blocks[index] if inside else ""
        linears = {linear.name: linear for linear in find_linears(self._model.get_submodule(name), name)}
        for name, weight in result.weights.items():
            linears[name].weight.copy_(weight)
        if inside:
            count_block(self._model, index)
        names = None if inside else [f"{name}.weight" for name in result.weights]
        tensors, part = stored_part(self._model, self._stream, index, self._format, names)
        note = {"names": part.names, "format": part.format, "packed": part.packed, "replaced": part.replaced}
        # The output takes over the file, which should not depend on how long a layer took.
        layers = [asdict(layer) | {"seconds": 0.0} for layer in result.layers]
        seconds = {layer.name: layer.seconds for layer in result.layers}
        if result.tuning is not None:
            note["tuning"] = result.tuning | {"seconds": 0.0}
            seconds[TUNING] = result.tuning["seconds"]
        self.finish()
        self._writing = self._stream.later(partial(self._write, part, tensors, {"layers": layers, **note}, seconds))

    def as_before(self, index: int) -> AbstractContextManager[object]:
        """Let the model read block `index` within as it was in front of the run."""
        return self._stream.read_from(index, self._before[index]) if index in self._before else nullcontext()

    def put_back(self, index: int) -> None:
        """Let the model read block `index` as it was in front of the run, until it is pruned again."""
        if index in self._before:
            self._stream.move(index, self._before.pop(index))

    def finish(self) -> None:
        """Wait until all blocks are on disk.

        Raises:
            OSError: the disk refuses the last one, which is not recorded then.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, part: Part, tensors: dict[str, torch.Tensor], note: dict[str, Any], seconds: dict[str, float]) -> None:
        write_atomically(self._seconds_of(part.index), json.dumps(seconds).encode())
        self.put(self._name(part.index), tensors, note)
        self._take(part.index, part)

    def follow(self, index: int) -> None:
        """Read block `index`, which another process has written, from here from now on."""
        self._take(index, self._read_note(index)[0])

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the result of block `index`, which is in memory, or None where it is not finished. See `Checkpoint.load`."""
        if not self.holds(index):
            return None
        part, layers, tuning = self._read_note(index)
        if index >= len(self._stream.blocks):
            tensors, _ = self.store.get(self._name(index))
            self._stream.put(self._model, tensors, part)
            self._take(index, part)
        weights = {linear.name: linear.weight for linear in linears}
        try:
            place = self.store.place(self._name(index))
            check_pruned(place, weights, layers, self.patterns, dense_allowed=self.dense_allowed)
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from error
        if index < len(self._stream.blocks):
            count_block(self._model, index)
        return BlockResult(weights, layers, tuning=tuning)

    def _read_note(self, index: int) -> tuple[Part, list[LayerReport], dict[str, float] | None]:
        """Return what the file of block `index` holds, its reports, and its entry in `Report.tuning`. Its tensors are not read.

        Raises:
            ValueError: the file, or that of its seconds, is damaged.
        """
        name = self._name(index)
        _, note = self.store.get(name, prefix=NO_TENSOR)
        self._check_note(name, note)
        try:
            part = made_part(index, note["names"], note["format"], note["packed"], note["replaced"])
            seconds = self._read_seconds(index)
            layers = [layer | {"seconds": seconds[layer["name"]]} for layer in note["layers"]]
            tuning = None if "tuning" not in note else _tuning_row(note["tuning"] | {"seconds": seconds[TUNING]})
            return part, [LayerReport.from_dict(layer) for layer in layers], tuning
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise self.damaged(name, error) from error

    def _read_seconds(self, index: int) -> dict[str, float]:
        found: dict[str, float] = json.loads(self._seconds_of(index).read_bytes())
        return found

    def _seconds_of(self, index: int) -> Path:
        """Return the file with the seconds of each layer of block `index`, and of its tuning."""
        return self.folder / f"{self._name(index)}.json"

    def _take(self, index: int, part: Part) -> Place | None:
        try:
            return self._stream.take(self.store.path(self._name(index)), part)
        except ValueError as error:
            raise self.damaged(index, error) from error


def _tuning_row(found: object) -> dict[str, float]:
    """Return an entry of `Report.tuning` from a file.

    Raises:
        TypeError: it is none.
    """
    try:
        return schema.mapping(schema.number)(found)
    except TypeError as error:
        raise TypeError(f"tuning: {error}") from error


def differences(found: dict, expected: dict) -> list[str]:
    """Return the sorted keys whose values differ or that one mapping lacks."""
    return sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
