"""The safetensors files of a model's folder: which of them transformers loads, and where each tensor's bytes are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER = 100_000_000  # bytes, the limit of safetensors


@dataclass(frozen=True)
class Stored:
    """The place of one tensor in a safetensors file.

    Attributes:
        path: the file.
        dtype: dtype as the file names it, such as `"BF16"`.
        shape: shape of the tensor.
        start: first byte in the file.
        nbytes: bytes of the tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def weight_files(folder: Path, named: str | None = None, extra: Sequence[str] = ()) -> list[Path]:
    """Return the safetensors files that transformers loads from a folder, or none if it holds no such checkpoint.

    Args:
        folder: the folder of a model.
        named: the file or index that `transformers_weights` in the config names.
        extra: further files that the class of the config names.

    Raises:
        ValueError: the index is damaged, or names no file or one that is missing.
    """
    main = folder / (named or SINGLE)
    if named is None and not main.is_file():
        main = folder / INDEX
    if not main.is_file():
        return []
    files = _files_of_index(main) if main.name.endswith(".index.json") else [main]
    return files + [folder / name for name in extra if (folder / name).is_file()]


def tensors_in(files: Iterable[Path]) -> dict[str, Stored]:
    """Return the place of each tensor by name. Only headers are read.

    Raises:
        ValueError: a file is damaged.
        OSError: a file cannot be read.
    """
    return {name: stored for path in files for name, stored in _header(path).items()}


def dtype_of(stored: Stored) -> torch.dtype:
    """Return the dtype of a tensor in a file.

    Raises:
        ValueError: torch has no such dtype, as safetensors knows it.
    """
    from safetensors.torch import _TYPES

    found = cast("dict[str, torch.dtype]", _TYPES).get(stored.dtype)
    if found is None:
        raise ValueError(f"{stored.path.name}: expected dtypes that torch reads, got {stored.dtype}")
    return found


def bits_of(dtype: str) -> int:
    """Return the bits of a value of a dtype as safetensors names it, such as `"BF16"` or `"F8_E4M3"`."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _files_of_index(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: the file is damaged ({error})") from error
    if not files:
        raise ValueError(f"{path.name} names no file")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path.name} names {file.name}, which is missing")
    return files


def _header(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {name: _stored(path, 8 + length, name, entry) for name, entry in entries.items()}
        _check_places(found, 8 + length)
        return found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: the file is damaged (its header: {error})") from error


def _stored(path: Path, offset: int, name: str, entry: dict) -> Stored:
    begin, end = entry["data_offsets"]
    stored = Stored(path, entry["dtype"], tuple(entry["shape"]), offset + begin, end - begin)
    if any(size < 0 for size in stored.shape):
        raise ValueError(f"{name} of shape {list(stored.shape)}")
    if 8 * stored.nbytes != math.prod(stored.shape) * bits_of(stored.dtype):
        raise ValueError(f"{name} of {stored.nbytes:,} bytes, which are no {stored.dtype} {list(stored.shape)}")
    return stored


def _check_places(stored: Mapping[str, Stored], start: int) -> None:
    """Raise `ValueError` unless each tensor begins where the one before ends."""
    for name, entry in sorted(stored.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != start:
            raise ValueError(f"{name} begins at byte {entry.start:,}, expected {start:,}")
        start += entry.nbytes
