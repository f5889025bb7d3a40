"""Stores of named entries of tensors with a note, in memory or in a folder with one file for each entry."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .._counts import groups_over, nonzeros
from .._files import disk_errors, remove_temporary, replace_atomically
from ..models import Linear
from ..pattern import NM, Unstructured, parse_pattern, pruned_count
from ..ranks import World
from ..reports.report import LayerReport

Tensors = dict[str, torch.Tensor]
STAYED_DENSE = "dense"  # the pattern in the report of a linear that could not be calibrated


class Store(Protocol):
    """Named entries of tensors and a note, which is a value that JSON can hold."""

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        """Store an entry, and replace an older one of that name."""

    def get(self, name: str, prefix: str = "") -> tuple[Tensors, Any]:
        """Return the note, and the tensors whose names begin with `prefix`, by name without the prefix."""

    def holds(self, name: str) -> bool:
        """Return whether there is an entry of that name."""

    def drop(self, prefix: str) -> None:
        """Remove the entries whose names begin with `prefix`."""

    def place(self, name: str) -> str:
        """Return the name of an entry for messages."""


class InMemory:
    """A store in host memory, for a run that leaves no state behind."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Tensors, str]] = {}

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        copies = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
        self._entries[name] = copies, json.dumps(note)

    def get(self, name: str, prefix: str = "") -> tuple[Tensors, Any]:
        tensors, note = self._entries[name]
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return found, json.loads(note)

    def holds(self, name: str) -> bool:
        return name in self._entries

    def drop(self, prefix: str) -> None:
        self._entries = {name: entry for name, entry in self._entries.items() if not name.startswith(prefix)}

    def place(self, name: str) -> str:
        return name


class InFolder:
    """A store in a folder. Each entry is a safetensors file with the note in its header.

    Every file appears by an atomic rename. The caller holds the lock of the folder.

    Attributes:
        folder: the folder.
        argument: see `__init__`.
        remedy: see `__init__`.
    """

    def __init__(self, folder: Path, argument: str, remedy: str, *, held: bool = True) -> None:
        """Open the store, and remove leftovers of killed calls.

        Args:
            folder: need not exist until the first `put`.
            argument: the argument that named the folder; messages begin with it.
            remedy: advice for a damaged file; messages end with it.
            held: False where another process holds the lock of the folder, so that nothing is removed.
        """
        self.folder, self.argument, self.remedy = folder, argument, remedy
        if held:
            remove_temporary(folder)

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        from safetensors.torch import save_file

        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in whole.values())
        metadata = {"format": "pt", "note": json.dumps(note)}  # transformers refuses a file without a format

        def write(path: Path) -> None:
            with disk_errors(path):
                save_file(whole, path, metadata)
            _sort_metadata(path)

        replace_atomically(self.path(name), write, f"{size:,} bytes")

    def get(self, name: str, prefix: str = "") -> tuple[Tensors, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(name), framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a mapping)
                return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}, json.loads(file.metadata()["note"])
        except FileNotFoundError as error:
            raise ValueError(f"{self.place(name)} is missing; {self.remedy}") from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.place(name)} is damaged ({error}); {self.remedy}") from error

    def holds(self, name: str) -> bool:
        return self.path(name).exists()

    def drop(self, prefix: str) -> None:
        for path in self.folder.glob(f"{prefix}*.safetensors"):
            path.unlink()

    def place(self, name: str) -> str:
        return f"{self.argument}: {self.path(name)}"

    def path(self, name: str) -> Path:
        """Return the file of an entry."""
        return self.folder / f"{name}.safetensors"


class OfRanks:
    """A store in a folder that all ranks see. The first one writes to it; the others wait until it has."""

    def __init__(self, world: World, folder: Path, argument: str, remedy: str) -> None:
        """Open the store.

        Args:
            world: the ranks. All of them store and remove the same entries, in the same order.
            folder: see `InFolder`.
            argument: likewise.
            remedy: likewise.
        """
        self._world, self._own = world, InFolder(folder, argument, remedy, held=world.leads)

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        if self._world.leads:
            self._own.put(name, tensors, note)
        self._world.agree(f"put {name}")

    def get(self, name: str, prefix: str = "") -> tuple[Tensors, Any]:
        return self._own.get(name, prefix)

    def holds(self, name: str) -> bool:
        return self._own.holds(name)

    def drop(self, prefix: str) -> None:
        self._world.agree(f"drop {prefix}")  # nobody reads them any more
        if self._world.leads:
            self._own.drop(prefix)
        self._world.agree(f"dropped {prefix}")

    def place(self, name: str) -> str:
        return self._own.place(name)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, whose order differs from process to process, so that equal entries are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def check_specs(where: str, tensors: Mapping[str, torch.Tensor], linears: Sequence[Linear]) -> None:
    """Raise `ValueError` unless `tensors` are weights of `linears`, by name, shape and dtype.

    Args:
        where: the name of the entry; the message begins with it.
        tensors: tensors by name of the linear.
        linears: the linears of one block of the model.
    """
    expected = {linear.name: (tuple(linear.weight.shape), linear.weight.dtype) for linear in linears}
    if {name: (tuple(weight.shape), weight.dtype) for name, weight in tensors.items()} != expected:
        raise ValueError(f"{where} holds other linears than the model's")


def check_pruned(
    where: str,
    weights: Mapping[str, torch.Tensor],
    layers: Sequence[LayerReport],
    patterns: Mapping[str, object],
    *,
    dense_allowed: bool = False,
) -> None:
    """Raise `ValueError` unless each weight is finite, and pruned in agreement with its pattern and its layer's report.

    Args:
        where: the name of the entry; messages begin with it.
        weights: weights by name of the linear.
        layers: the report of each linear.
        patterns: the pattern of each linear as text, by name.
        dense_allowed: True if a linear may have stayed dense, as its report says.
    """
    reports = {layer.name: layer for layer in layers}
    if reports.keys() != weights.keys():
        raise ValueError(f"{where} holds reports of other linears than its weights")
    check_finite_tensors(where, weights)
    for name, weight in weights.items():
        layer, zeros = reports[name], weight.numel() - int(nonzeros(weight))
        pattern = STAYED_DENSE if dense_allowed and layer.pattern == STAYED_DENSE else str(patterns[name])
        if (layer.pattern, tuple(layer.shape)) != (pattern, tuple(weight.shape)):
            found = f"{layer.pattern} of {tuple(layer.shape)}"
            raise ValueError(f"{where}: {name}: expected {pattern} of {tuple(weight.shape)}, got {found}")
        if zeros != layer.zeros or not _fits(weight, zeros, pattern):
            raise ValueError(f"{where}: {name} is not pruned to {pattern}: {zeros:,} of {weight.numel():,} weights are zero")


def _fits(weight: torch.Tensor, zeros: int, pattern: str) -> bool:
    """Return whether a weight with that many zeros is pruned to a pattern."""
    try:
        parsed = parse_pattern(pattern)
    except ValueError:  # whole rows and columns, of which only the number is known
        return True
    if isinstance(parsed, NM):
        return not groups_over(weight, parsed.n, parsed.m)
    return has_zeros_of(parsed, weight.shape, zeros)


def has_zeros_of(pattern: object, shape: Sequence[int], zeros: int) -> bool:
    """Return whether a weight has the zeros of a sparsity, which may be rounded down by row or by block of columns.

    Args:
        pattern: of another kind than `Unstructured`, it is met by any number.
        shape: of the weight.
        zeros: of the weight.
    """
    if not isinstance(pattern, Unstructured):
        return True
    return zeros >= pruned_count(math.prod(shape), pattern.sparsity) - sum(shape)


def check_finite_tensors(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError`, whose message begins with `where`, if a tensor holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or Inf")


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings that JSON can hold, which identifies the run of an entry."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
