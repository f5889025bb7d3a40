"""Saving a pruned model: the folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import torch

from .card import model_card

FORMATS = ("dense",)


def save(model: torch.nn.Module, path: str | os.PathLike, format: str = "dense", *, tokenizer=None) -> Path:
    """Save a pruned model so that plain `AutoModelForCausalLM.from_pretrained(path)` loads it.

    Everything is written to a new folder beside `path`, which then takes its name.

    Args:
        model: a transformers model.
        path: a new or empty folder.
        format: `"dense"`: the zeros are stored like any weight, and every loader takes the folder.
        tokenizer: saved along where given.

    Returns:
        `path`.

    Raises:
        TypeError: a model without `save_pretrained`.
        ValueError: an unknown format.
        FileExistsError: `path` is a file, or a folder that holds something.
        OSError: no space left; nothing is left behind then.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    check_format(format)
    path = Path(path).expanduser().absolute()
    check_output_folder(path)
    check_space(model, path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(model), encoding="utf-8")
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def check_format(format: str) -> None:
    if format == "packed":
        raise ValueError("format: 'packed' comes with a later release of sparsekern; use 'dense'")
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")


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
    needed = copies * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    existing = Path(path).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"out: no space left: the weights need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, message, str(path))
