"""The state of a continual run: the dense weights, and the names and statistics of each dataset. It holds no data.

`state.json` names the datasets seen and their perplexities. `dense-00003.safetensors` holds the dense weights of block 3.
`step-0002-00003.safetensors` holds its weights after the second dataset, the totals so far, and the digests of that dataset and of
the run's settings. Every file appears by an atomic rename and never changes. The files of a step are removed once the next one is in
`state.json`. A call holds the lock `.lock` throughout, so that no other call works on the state.

Of several ranks the first one writes; the others read its files. Without a folder, each rank keeps all in its memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from ..._files import locked, write_atomically
from ...models import Linear
from ...ranks import World
from ...reports.continual import ContinualStep
from ...reports.report import LayerReport
from ...runtime.output import checked_path
from ..mixtures import DENSE
from ..run import BlockResult
from ..store import InMemory, OfRanks, Store, check_finite_tensors, check_pruned, check_specs, digest_of

STATE, LOCK = "state.json", ".lock"
FORMAT = 1
REMEDY = "the state cannot be continued"
REMEDY_UNFINISHED = "remove it to redo its part of the step"
WEIGHT, MEMORY = "weight/", "memory/"


class State:
    """The finished steps, the unfinished step if there is one, and the store of their blocks.

    Attributes:
        folder: None keeps everything in memory.
        store: the blocks.
        settings: settings of the run; empty in a new state.
        dense: perplexities of the dense model, by dataset.
        evaluation: by dataset, the digest and the length of the windows that perplexities are taken on.
        steps: the finished steps.
        seen: name and digest of each dataset; one more than `steps` while a step is under way.
    """

    def __init__(self, folder: Path | None, world: World | None = None) -> None:
        self.folder, self._leads = folder, world is None or world.leads
        self.store: Store = InMemory()
        self._unfinished: Store = self.store
        if folder is not None:
            self.store, self._unfinished = (
                OfRanks(world or World(), folder, "state", remedy) for remedy in (REMEDY, REMEDY_UNFINISHED)
            )
        self.settings: dict[str, object] = {}
        self.dense: dict[str, float] = {}
        self.evaluation: dict[str, list] = {}
        self.steps: list[ContinualStep] = []
        self.seen: list[list[str]] = []
        if folder is not None and (folder / STATE).exists():
            self._read(folder / STATE)

    @classmethod
    @contextmanager
    def opened(cls, folder: str | os.PathLike | None, world: World | None = None) -> Iterator[State]:
        """Yield the state in `folder`, which may be missing or empty, and hold its lock; None keeps everything in memory.

        Args:
            folder: the folder.
            world: the ranks, all of which call this and see the folder. None is a single process.

        Raises:
            ValueError: the folder holds something else, or a state that is damaged, of another version or in use; or ranks see
                different states.
            OSError: the folder cannot be made or written to.
        """
        if folder is None:
            yield cls(None)
            return
        folder = checked_path(folder, "state")
        world = world or World()
        if not world.leads:
            world.agree("state held")
            yield cls._read_by_all(folder, world)
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"state: {folder} is not a folder")
        is_new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"state: the folder {str(folder)!r} cannot be made ({error.strerror})") from error
        if not (folder / STATE).exists() and any(not entry.name.startswith((".", "dense-")) for entry in folder.iterdir()):
            raise ValueError(f"state: {folder} holds no {STATE}, so it is not a state of prune_continually")
        try:
            with locked(folder / LOCK, f"state: {folder}"):
                world.agree("state held")
                yield cls._read_by_all(folder, world)
        finally:
            if is_new:
                with suppress(OSError):  # it holds a state
                    folder.rmdir()

    @classmethod
    def _read_by_all(cls, folder: Path, world: World) -> State:
        """Return the state, once all ranks have read it."""
        state = cls(folder, world)
        world.check_alike({"state": [state.settings, state.seen, [asdict(step) for step in state.steps]]})
        return state

    @property
    def is_new(self) -> bool:
        """True if no run has used the state."""
        return not self.settings

    @property
    def under_way(self) -> bool:
        """True if there is an unfinished step."""
        return len(self.seen) > len(self.steps)

    def write(self) -> None:
        """Write `state.json`, if there is a folder."""
        if self.folder is not None and self._leads:
            steps = [asdict(step) for step in self.steps]
            whole = {"format": FORMAT, "settings": self.settings, "dense": self.dense, "evaluation": self.evaluation}
            whole |= {"steps": steps, "seen": self.seen}
            write_atomically(self.folder / STATE, json.dumps(whole, indent=1).encode())

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_bytes())
            version = found["format"]
            if version == FORMAT:
                self.settings, self.dense = dict(found["settings"]), dict(found["dense"])
                self.evaluation = dict(found.get("evaluation", {}))  # an older state has none
                self.seen = [[name, digest] for name, digest in found["seen"]]
                self.steps = [ContinualStep.from_dict(step) for step in found["steps"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"state: {path} is not a state of prune_continually ({error})") from error
        if version != FORMAT:
            raise ValueError(f"state: {path} has format {version}, this version reads {FORMAT}")

    def abandon(self) -> StepFiles:
        """Drop the unfinished step and the perplexities of datasets that were not used. Nothing changes on disk yet.

        Returns:
            The files of the step. Drop them before the state is written: a recorded step without files is recoverable, files without
            a record are not.

        Raises:
            ValueError: no step is under way.
        """
        if not self.under_way:
            raise ValueError(f"abandon: {self.folder} holds no unfinished step")
        files = self.step(len(self.seen))
        self.seen.pop()
        names = dict(self.seen)
        self.dense = {name: value for name, value in self.dense.items() if name in names}
        self.evaluation = {name: value for name, value in self.evaluation.items() if name in names}
        return files

    def dense_weights(self, index: int, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
        """Return the dense weights of block `index`, by linear.

        Raises:
            ValueError: the file is damaged, or holds other linears, NaN or Inf.
        """
        name = f"dense-{index:05d}"
        weights, where = self.store.get(name)[0], self.store.place(name)
        with _remedied(REMEDY):
            check_specs(where, weights, linears)
            check_finite_tensors(where, weights)
        return weights

    def step(self, number: int) -> StepFiles:
        """Return the files of step `number`, counted from 1, which may be unfinished."""
        name, digest = self.seen[number - 1]
        store, remedy = (self.store, REMEDY) if number <= len(self.steps) else (self._unfinished, REMEDY_UNFINISHED)
        return StepFiles(store, f"step-{number:04d}-", name, digest, self.settings, remedy)


class StepFiles:
    """The finished blocks of one step, each with its totals so far."""

    def __init__(self, store: Store, prefix: str, name: str, digest: str, settings: dict, remedy: str) -> None:
        """Take the blocks of a step from a store.

        Args:
            store: holds the blocks.
            prefix: prefix of their names in the store.
            name: name of the step's dataset.
            digest: digest of the dataset's tokens.
            settings: settings of the run, whose `patterns` are those of each linear.
            remedy: what to do about a damaged file; messages end with it.
        """
        self.store, self.prefix, self.name, self.remedy = store, prefix, name, remedy
        self.origin = {"data": digest, "run": digest_of(settings)}
        self.patterns: dict[str, str] = settings.get("patterns", {})
        self.dense_allowed = settings.get("unseen") == DENSE

    def save(self, index: int, result: BlockResult) -> None:
        """Write the result of block `index`."""
        tensors = {WEIGHT + name: weight for name, weight in result.weights.items()}
        tensors |= {MEMORY + name: total for name, total in result.totals.items()}
        self.store.put(self._name(index), tensors, {**self.origin, "layers": [asdict(layer) for layer in result.layers]})

    def finish(self) -> None:
        """Do nothing: `save` returns once a block is on disk."""

    def as_before(self, index: int) -> AbstractContextManager[object]:
        """Do nothing within: the weights of a block are those that a step gives it."""
        return nullcontext()

    def put_back(self, index: int) -> None:
        """Do nothing, as `as_before` does."""

    def holds(self, index: int) -> bool:
        """Return whether block `index` is finished."""
        return self.store.holds(self._name(index))

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the weights and reports of block `index`, or None where it is not finished.

        Raises:
            ValueError: the file is damaged, of another dataset or run, or holds other linears or weights that are not pruned.
        """
        if not self.holds(index):
            return None
        weights, layers = self._get(index, WEIGHT)
        where = self.store.place(self._name(index))
        with _remedied(self.remedy):
            check_specs(where, weights, linears)
            if layers is None:  # an older state
                return BlockResult(weights, [])
            check_pruned(where, weights, layers, self.patterns, dense_allowed=self.dense_allowed)
        return BlockResult(weights, layers)

    def weights(self, index: int, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
        """Return the weights of block `index` of a finished step.

        Raises:
            ValueError: see `load`; also the file is missing.
        """
        found = self.load(index, linears)
        if found is None:
            raise ValueError(f"{self.store.place(self._name(index))} is missing; {REMEDY}")
        return dict(found.weights)

    def totals(self, index: int) -> dict[str, torch.Tensor]:
        """Return the totals of block `index` over this dataset and the earlier ones.

        Raises:
            ValueError: the file is damaged, of another dataset or run, or holds NaN or Inf.
        """
        totals = self._get(index, MEMORY)[0]
        with _remedied(self.remedy):
            check_finite_tensors(self.store.place(self._name(index)), totals)
        return totals

    def drop(self) -> None:
        """Remove all blocks of the step."""
        self.store.drop(self.prefix)

    def _get(self, index: int, prefix: str) -> tuple[dict[str, torch.Tensor], list[LayerReport] | None]:
        name = self._name(index)
        tensors, note = self.store.get(name, prefix)
        if isinstance(note, list):  # an older state, whose files know neither dataset nor run
            return tensors, None
        try:
            layers = [LayerReport.from_dict(layer) for layer in note["layers"]]
            origin = {key: note[key] for key in self.origin if key in note}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.store.place(name)} is damaged ({error}); {self.remedy}") from error
        if origin.get("data") != self.origin["data"]:
            raise ValueError(f"state: expected {name} to be of {self.name!r}, got that of another dataset; {self.remedy}")
        if origin.get("run", self.origin["run"]) != self.origin["run"]:
            raise ValueError(f"state: expected {name} to be of this run, got that of one with other settings; {self.remedy}")
        return tensors, layers

    def _name(self, index: int) -> str:
        return f"{self.prefix}{index:05d}"


@contextmanager
def _remedied(remedy: str) -> Iterator[None]:
    """Say in the errors of a refused entry what to do about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
