"""What is kept between data sets: the dense weights, what was learned of them, and which data sets these were. No data.

`state.json` names the data sets seen and their perplexities; `dense-00003.safetensors` holds the dense weights of block 3, and
`step-0002-00003.safetensors` its weights after the second data set with what was accumulated until then. Every file appears by an
atomic rename and never changes, and the files of a step are removed once the next one is in `state.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from ..models import Linear
from .continual_report import Step
from .files import write_atomically
from .report import LayerReport

STATE = "state.json"
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

    def __init__(self, folder: str | os.PathLike | None) -> None:
        """Open the state in `folder`, which may be missing or empty; None keeps everything in memory.

        Raises:
            ValueError: the folder holds something else, or a state that is damaged or of another version.
        """
        self.folder = None if folder is None else Path(folder).expanduser()
        self.store: Store = InMemory() if self.folder is None else InFolder(self.folder)
        self.settings: dict[str, object] = {}
        self.dense: dict[str, float] = {}
        self.steps: list[Step] = []
        self.seen: list[list[str]] = []  # name and digest of each data set; one more than `steps` while a step is under way
        if self.folder is None or not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(f"state: {self.folder} is no folder")
        if (self.folder / STATE).exists():
            self._read()
        elif any(not entry.name.startswith((".", "dense-")) for entry in self.folder.iterdir()):
            raise ValueError(f"state: {self.folder} holds no {STATE}, so it is not a state of prune_continually")

    @property
    def is_new(self) -> bool:
        return not self.settings

    @property
    def under_way(self) -> bool:
        return len(self.seen) > len(self.steps)

    def write(self) -> None:
        if self.folder is not None:
            steps = [asdict(step) for step in self.steps]
            whole = {"format": FORMAT, "settings": self.settings, "dense": self.dense, "steps": steps, "seen": self.seen}
            write_atomically(self.folder / STATE, json.dumps(whole, indent=1).encode())

    def _read(self) -> None:
        path = self.folder / STATE
        try:
            found = json.loads(path.read_bytes())
            version = found["format"]
            if version == FORMAT:
                self.settings, self.dense = dict(found["settings"]), dict(found["dense"])
                self.seen = [[name, digest] for name, digest in found["seen"]]
                self.steps = [Step(**step) for step in found["steps"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"state: {path} is not the state of a prune_continually ({error})") from error
        if version != FORMAT:
            raise ValueError(f"state: {path} has format {version}, this version reads {FORMAT}")

    def dense_weights(self, index: int, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
        """The dense weights of block `index`, by linear.

        Raises:
            ValueError: the file is damaged, or holds other linears.
        """
        return _expected(self.store.get(f"dense-{index:05d}")[0], linears, f"dense-{index:05d}")

    def step(self, number: int) -> StepFiles:
        """What step `number`, from 1, left or is to leave."""
        return StepFiles(self.store, f"step-{number:04d}-")


class StepFiles:
    """The blocks of one step: a pipeline's checkpoint that keeps what was accumulated as well."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix
        self.accumulated: dict[str, torch.Tensor] = {}  # of the block that is being solved; saved with it

    def save(self, index: int, weights: dict[str, torch.Tensor], layers: Sequence[LayerReport]) -> None:
        tensors = {WEIGHT + name: weight for name, weight in weights.items()}
        tensors |= {MEMORY + name: total for name, total in self.accumulated.items()}
        self.store.put(self._name(index), tensors, json.dumps([asdict(layer) for layer in layers]))
        self.accumulated = {}

    def holds(self, index: int) -> bool:
        return self.store.holds(self._name(index))

    def load(self, index: int, linears: Sequence[Linear]) -> tuple[dict[str, torch.Tensor], list[LayerReport]] | None:
        """The weights and reports of block `index`, or None where it is not finished.

        Raises:
            ValueError: the file is damaged or holds other linears.
        """
        if not self.holds(index):
            return None
        weights, note = self.store.get(self._name(index), WEIGHT)
        return _expected(weights, linears, self._name(index)), [LayerReport.from_dict(layer) for layer in json.loads(note)]

    def memory(self, index: int) -> dict[str, torch.Tensor]:
        return self.store.get(self._name(index), MEMORY)[0]

    def drop(self) -> None:
        self.store.drop(self.prefix)

    def _name(self, index: int) -> str:
        return f"{self.prefix}{index:05d}"


def _expected(weights: dict[str, torch.Tensor], linears: Sequence[Linear], file: str) -> dict[str, torch.Tensor]:
    expected = {linear.name: (tuple(linear.weight.shape), linear.weight.dtype) for linear in linears}
    if {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()} != expected:
        raise ValueError(f"state: {file} holds other linears than the model's")
    return weights
