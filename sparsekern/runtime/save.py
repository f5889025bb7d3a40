"""Saving a pruned model: the folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

import torch

from .card import model_card
from .formats import format_of
from .packing import AUTO, is_packed, packed_copy, unpacked_copy, weight_bytes

DENSE, PACKED = "dense", "packed"


def save(model: torch.nn.Module, path: str | os.PathLike, format: str = "dense", *, tokenizer=None) -> Path:
    """Save a pruned model so that plain `AutoModelForCausalLM.from_pretrained(path)` loads it.

    Everything is written to a new folder beside `path`, which then takes its name. The model stays as it is.

    Args:
        model: a transformers model, packed by `sparsekern.pack` or not.
        path: a new or empty folder.
        format: `"dense"`: the zeros are stored like any weight, and every loader takes the folder. `"packed"`: linears that get
            smaller by it are stored packed, each in the format that it fits best, or as it is packed already; to load it, `import
            sparsekern` first. `"bitmask"` or `"N:M"`: packed, in that format only.
        tokenizer: saved along where given.

    Returns:
        `path`, links resolved.

    Raises:
        TypeError: a model without `save_pretrained`.
        ValueError: an unknown format; a model to be packed in which nothing gets smaller.
        FileExistsError: `path` is a file, or a folder that holds something.
        OSError: no space left; nothing is left behind then.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    check_format(format)
    path = Path(path).expanduser().resolve()
    check_output_folder(path)
    model = in_format(model, format)
    _remove_stale(path)
    check_space(model, path)
    staging = _staging(path, os.getpid())
    try:
        staging.mkdir(parents=True)
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(model, packed=format != DENSE), encoding="utf-8")
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _staging(path: Path, process: int | str) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{process}.tmp")


def _remove_stale(path: Path) -> None:
    """Remove what saves to `path` left that were killed: those of this host whose process is no more, or has this one's number."""
    first, _, last = _staging(path, "*").name.rpartition("*")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        process = folder.name.removeprefix(first).removesuffix(last)
        if folder.name == f"{first}{process}{last}" and process.isdecimal() and not _runs_elsewhere(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs_elsewhere(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's
        pass
    return True


def in_format(model: torch.nn.Module, format: str) -> torch.nn.Module:
    """The model as it is to be saved: itself, or a copy that shares with it what has the same form in both."""
    if format == DENSE:
        return unpacked_copy(model) if is_packed(model) else model
    return packed_copy(model, AUTO if format == PACKED else format)


def check_format(format: str) -> None:
    """Raise `ValueError` unless `format` is one to save in."""
    if format not in (DENSE, PACKED):
        try:
            format_of(format)
        except (TypeError, ValueError) as error:
            raise ValueError(f"format: expected 'dense', 'packed', 'bitmask' or 'N:M', got {format!r}") from error


def check_output_folder(path: str | os.PathLike) -> None:
    """Raise `FileExistsError` unless `path` is new or an empty folder, and could be made."""
    path = Path(path).expanduser()
    for file in (path, *path.parents):
        if file.exists() and not file.is_dir():
            raise FileExistsError(f"out: {str(file)!r} is a file, expected a folder")
    held = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if held:
        shown = ", ".join(held[:3]) + (", …" if len(held) > 3 else "")
        raise FileExistsError(f"out: the folder {str(path)!r} already holds something else ({shown}); name a new or empty one")


def check_space(model: torch.nn.Module, path: str | os.PathLike, copies: int = 1) -> None:
    """Raise `OSError` (ENOSPC) unless the disk of `path` has room for the weights: better before the work than after."""
    needed = copies * weight_bytes(model)
    existing = Path(path).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"out: no space left: the weights need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, message, str(path))
