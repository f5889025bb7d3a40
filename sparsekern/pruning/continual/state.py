"""What is kept between data sets: the dense weights, what was learned of them, and which data sets these were. No data.

`state.json` names the data sets seen and their perplexities; `dense-00003.safetensors` holds the dense weights of block 3, and
`step-0002-00003.safetensors` its weights after the second data set with what was accumulated until then, and the digest of that data
set. Every file appears by an atomic rename and never changes, and the files of a step are removed once the next one is in `state.json`.
A call holds the lock `.lock` for as long as it lasts, so that no other works on the state meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from ..._files import locked, write_atomically
from ...models import Linear
from ...reports.continual import ContinualStep
from ...reports.report import LayerReport
from ..run import BlockResult

STATE, LOCK = "state.json", ".lock"
FORMAT = 1
WEIGHT, MEMORY = "weight/", "memory/"


class Store(Protocol):
    """Tensors and texts under names."""

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: str = "") -> None: ...

    def get(self, name: str, prefix: str = "") -> tuple[dict[str, torch.Tensor], str]:
        """The tensors whose names begin with `prefix`, without it, and the note."""

    def holds(self, name: str) -> bool: ...

    def drop(self, prefix: str) -> None: ...


class InMemory:
    """For a run that leaves no state behind: everything in host memory."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[dict[str, torch.Tensor], str]] = {}

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: str = "") -> None:
        self._entries[name] = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, note

    def get(self, name: str, prefix: str = "") -> tuple[dict[str, torch.Tensor], str]:
        tensors, note = self._entries[name]
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}, note

    def holds(self, name: str) -> bool:
        return name in self._entries

    def drop(self, prefix: str) -> None:
        self._entries = {name: entry for name, entry in self._entries.items() if not name.startswith(prefix)}


class InFolder:
    """Each entry one safetensors file, written atomically; the note lies in its header."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: str = "") -> None:
        from safetensors.torch import save

        write_atomically(self._path(name), save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"note": note}))

    def get(self, name: str, prefix: str = "") -> tuple[dict[str, torch.Tensor], str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(name), framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a mapping)
                return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}, file.metadata()["note"]
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"state: {self._path(name)} is damaged ({error}); the state cannot be gone on with") from error

    def holds(self, name: str) -> bool:
        return self._path(name).exists()

    def drop(self, prefix: str) -> None:
        for path in self.folder.glob(f"{prefix}*.safetensors"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class State:
    """The steps done so far, the one under way if there is one, and the store of what goes with them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.store: Store = InMemory() if folder is None else InFolder(folder)
        self.settings: dict[str, object] = {}
        self.dense: dict[str, float] = {}
        self.evaluation: dict[str, list] = {}  # by data set, digest and window length of what its perplexities are taken on
        self.steps: list[ContinualStep] = []
        self.seen: list[list[str]] = []  # name and digest of each data set; one more than `steps` while a step is under way
        if folder is not None and (folder / STATE).exists():
            self._read()

    @classmethod
    @contextmanager
    def opened(cls, folder: str | os.PathLike | None) -> Iterator[State]:
        """The state in `folder`, which may be missing or empty, for nobody else meanwhile; None keeps everything in memory.

        Raises:
            ValueError: the folder holds something else, or a state that is damaged, of another version or in use.
        """
        if folder is None:
            yield cls(None)
            return
        folder = Path(folder).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"state: {folder} is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / STATE).exists() and any(not entry.name.startswith((".", "dense-")) for entry in folder.iterdir()):
            raise ValueError(f"state: {folder} holds no {STATE}, so it is not a state of prune_continually")
        with locked(folder / LOCK, f"state: {folder}"):
            yield cls(folder)

    @property
    def is_new(self) -> bool:
        return not self.settings

    @property
    def under_way(self) -> bool:
        return len(self.seen) > len(self.steps)

    def write(self) -> None:
        if self.folder is not None:
            steps = [asdict(step) for step in self.steps]
            whole = {"format": FORMAT, "settings": self.settings, "dense": self.dense, "evaluation": self.evaluation}
            whole |= {"steps": steps, "seen": self.seen}
            write_atomically(self.folder / STATE, json.dumps(whole, indent=1).encode())

    def _read(self) -> None:
        path = self.folder / STATE
        try:
            found = json.loads(path.read_bytes())
            version = found["format"]
            if version == FORMAT:
                self.settings, self.dense = dict(found["settings"]), dict(found["dense"])
                self.evaluation = dict(found.get("evaluation", {}))  # an older state has none, and takes what it is given next
                self.seen = [[name, digest] for name, digest in found["seen"]]
                self.steps = [ContinualStep.from_dict(step) for step in found["steps"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"state: {path} is not the state of a prune_continually ({error})") from error
        if version != FORMAT:
            raise ValueError(f"state: {path} has format {version}, this version reads {FORMAT}")

    def abandon(self) -> StepFiles:
        """Forget the step that is under way, and the perplexities of data sets that were not taken in, but for what is on disk.

        Returns:
            The files of the step, to be dropped before the state is written: a step with a name can be without, but not the reverse.

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
        """The dense weights of block `index`, by linear.

        Raises:
            ValueError: the file is damaged, or holds other linears.
        """
        return _expected(self.store.get(f"dense-{index:05d}")[0], linears, f"dense-{index:05d}")

    def step(self, number: int) -> StepFiles:
        """What step `number`, from 1, left or is to leave."""
        return StepFiles(self.store, f"step-{number:04d}-", *self.seen[number - 1])


class StepFiles:
    """The blocks of one step, that of a data set with its digest: a pipeline's checkpoint that keeps what was accumulated as well."""

    def __init__(self, store: Store, prefix: str, name: str, digest: str) -> None:
        self.store, self.prefix, self.name, self.digest = store, prefix, name, digest

    def save(self, index: int, result: BlockResult) -> None:
        """Write the result of block `index`."""
        tensors = {WEIGHT + name: weight for name, weight in result.weights.items()}
        tensors |= {MEMORY + name: total for name, total in result.totals.items()}
        note = {"data": self.digest, "layers": [asdict(layer) for layer in result.layers]}
        self.store.put(self._name(index), tensors, json.dumps(note))

    def holds(self, index: int) -> bool:
        return self.store.holds(self._name(index))

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the weights and reports of block `index`, or None where it is not finished.

        Raises:
            ValueError: the file is damaged, or holds other linears or what another data set left.
        """
        if not self.holds(index):
            return None
        weights, layers = self._get(index, WEIGHT)
        expected = _expected(weights, linears, self._name(index))
        return BlockResult(expected, [LayerReport.from_dict(layer) for layer in layers])

    def weights(self, index: int, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
        """The weights of block `index` of a step that is finished. Raises what `load` raises, also where the file is missing."""
        return _expected(self._get(index, WEIGHT)[0], linears, self._name(index))

    def totals(self, index: int) -> dict[str, torch.Tensor]:
        """Return the totals of block `index` over this dataset and the earlier ones."""
        return self._get(index, MEMORY)[0]

    def _get(self, index: int, prefix: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
        tensors, note = self.store.get(self._name(index), prefix)
        found = json.loads(note)
        if isinstance(found, list):  # an older state, whose files do not know their data set
            return tensors, found
        if found["data"] != self.digest:
            raise ValueError(f"state: expected {self._name(index)} to be of {self.name!r}, got that of another data set")
        return tensors, found["layers"]

    def drop(self) -> None:
        self.store.drop(self.prefix)

    def _name(self, index: int) -> str:
        return f"{self.prefix}{index:05d}"


def _expected(weights: dict[str, torch.Tensor], linears: Sequence[Linear], file: str) -> dict[str, torch.Tensor]:
    expected = {linear.name: (tuple(linear.weight.shape), linear.weight.dtype) for linear in linears}
    if {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()} != expected:
        raise ValueError(f"state: {file} holds other linears than the model's")
    return weights
