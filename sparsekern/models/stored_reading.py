"""Reading of safetensors files that must not change meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .stored_files import Tensors
from .weight_files import Stored

SAMPLE = 64  # bytes of each tensor that a digest reads


class SourceError(ValueError):
    """A fault of a checkpoint's files, whoever comes upon it."""


class Stamps:
    """The size, time and number of files when they were opened."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self.add(paths)

    def add(self, paths: Iterable[Path]) -> None:
        """Take files as they are now."""
        self._stamps |= {path: _stamp(path) for path in paths}

    def check(self, paths: Iterable[Path]) -> None:
        """Raise `ValueError` if one of the files has changed since it was opened."""
        for path in paths:
            if not path.exists() or _stamp(path) != self._stamps[path]:
                raise SourceError(f"model: {path} has changed since it was opened")

    def check_lengths(self, stored: Mapping[str, Stored]) -> None:
        """Raise `ValueError` if a file ends before one of these tensors does."""
        for name, entry in stored.items():
            if entry.start + entry.nbytes > self._stamps[entry.path][0]:
                raise SourceError(f"model: {entry.path} is damaged: it ends before {name}")

    def read_into(self, entry: Stored, begin: int, target: torch.Tensor) -> None:
        """Read bytes of a tensor into memory.

        Args:
            entry: the place of the tensor.
            begin: the first byte to read, counted from the tensor's own first.
            target: `[bytes]` uint8 on the CPU.

        Raises:
            ValueError: the file has fewer bytes, or cannot be read.
        """
        left = target.numpy().data
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.start + begin)
                while left:
                    if not (count := file.readinto(left)):
                        raise SourceError(
                            f"model: {entry.path} can no longer be read: it ends before byte {file.tell() + len(left):,}"
                        )
                    left = left[count:]
        except OSError as error:
            raise SourceError(f"model: {entry.path} can no longer be read: {error}") from error

    def read(self, stored: Mapping[str, Stored]) -> Tensors:
        """Return tensors in memory of their own. A mapped file would count as memory until it is closed.

        Raises:
            ValueError: a file has changed since it was opened, or cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        by_path: dict[Path, list[str]] = {}
        for name, entry in stored.items():
            by_path.setdefault(entry.path, []).append(name)
        found = {}
        self.check(by_path)
        for path, own in by_path.items():
            try:
                with safe_open(path, framework="pt", backend="pread") as opened:
                    for name in own:
                        found[name] = opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise SourceError(f"model: {path} can no longer be read: {error}") from error
        return found


def digest_of(stored: Mapping[str, Stored]) -> str:
    """Return a digest of the names, shapes and dtypes of tensors, and of a few bytes of each."""
    digest = hashlib.sha256()
    for name, entry in sorted(stored.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape};".encode())
        with entry.path.open("rb") as file:
            for part in range(2):
                file.seek(entry.start + part * max(0, entry.nbytes - SAMPLE))
                digest.update(file.read(min(SAMPLE, entry.nbytes)))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
