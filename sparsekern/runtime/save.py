"""Saving a model: check before the work what would be refused after it, then write the folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .._files import disk_errors
from ..models.units import recorded_units
from .card import model_card
from .formats import format_of
from .hf_config import METHOD, VERSION
from .output import CONFIG, OutputFolder, check_model_folder, check_output_folder
from .packing import PACKED, is_packed, packed_copy, unpacked_copy, weight_bytes

DENSE = "dense"
CARD = "README.md"


def save(
    model: torch.nn.Module, path: str | os.PathLike, format: str = "dense", *, tokenizer=None, overwrite: bool = False
) -> Path:
    """Save a pruned model so that plain `AutoModelForCausalLM.from_pretrained(path)` loads it.

    The folder gets its `config.json` last, so it is loadable only once it is whole. The model is not changed.

    Args:
        model: a transformers model, packed by `sparsekern.pack` or not.
        path: a new or empty folder.
        format: `"dense"`: the zeros are stored like any weight, and every loader takes the folder. `"packed"`: linears that get
            smaller by it are stored packed, each in the format that it fits best, or in its own where it is packed already; to load
            it, `import sparsekern` first. `"bitmask"` or `"N:M"`: packed, in that format only.
        tokenizer: is saved to the folder too.
        overwrite: replace the model in `path`: its weights, configs, card and reports. Other files stay.

    Returns:
        `path`, links resolved.

    Raises:
        TypeError: a model or a tokenizer without `save_pretrained`.
        ValueError: an unknown format; a model to be packed in which nothing gets smaller; a model or a tokenizer that transformers
            refuses to save; a folder that another call is saving to.
        FileExistsError: `path` is a file, or a folder that holds something, or with `overwrite` something that is no model.
        OSError: no space left, or a folder that cannot be written to; nothing is left behind then.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    check_format(format)
    with OutputFolder.held(path, "path", check_model_folder if overwrite else check_output_folder) as folder:
        model = in_format(model, format)
        check_space(model, folder.path, argument="path")
        with folder.staged(replace=overwrite) as staging:
            write_model(model, staging, tokenizer)
            (staging / CARD).write_text(model_card(model, packed=format != DENSE), encoding="utf-8")
    return folder.path


def write_model(model: torch.nn.Module, folder: Path, tokenizer=None) -> None:
    """Write weights, configs and tokenizer to `folder`.

    Raises:
        TypeError: a tokenizer without `save_pretrained`.
        ValueError: transformers refuses to save the model or the tokenizer.
        OSError: the disk does; its number says why.
    """
    with disk_errors(folder), _refusals("model"):
        model.save_pretrained(folder)
    if recorded_units(getattr(model, "config", None)) is not None:
        _name_the_loader(folder / CONFIG)
    _write_tokenizer(tokenizer, folder)


def _name_the_loader(config: Path) -> None:
    """Let transformers know that a cut model is built by sparsekern, without which its sizes do not fit."""
    entries = json.loads(config.read_bytes())
    entries.setdefault("quantization_config", {"quant_method": METHOD, "version": VERSION, "layers": {}})
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_saveable(model: torch.nn.Module, tokenizer, folder: OutputFolder) -> None:
    """Save all but the weights to a scratch folder, so that what transformers refuses is found before the work.

    Args:
        model: the model that is going to be saved, before or after it is pruned.
        tokenizer: the tokenizer to be saved with it, or None.
        folder: the folder that it is going to be saved to.

    Raises:
        TypeError: a model or a tokenizer without `save_pretrained`.
        ValueError: transformers refuses to save the model or the tokenizer.
        OSError: the folder cannot be written to.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"out: expected a model with save_pretrained, got {type(model).__name__}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"out: transformers refuses to save a model that it loaded as {getattr(method, 'value', method)}; "
            "load it with sparsekern.load, or save it dense and load that"
        )
    with folder.scratch() as scratch:
        with _refusals("model"):
            if hasattr(model, "config"):
                model.config.save_pretrained(scratch)
            if hasattr(model, "can_generate") and model.can_generate():
                model.generation_config.save_pretrained(scratch)
            _check_shared_weights(model)
        _write_tokenizer(tokenizer, scratch)


def _check_shared_weights(model: torch.nn.Module) -> None:
    """Raise what `save_pretrained` raises for weights that share memory, where this transformers lets us ask it."""
    from transformers import modeling_utils

    check = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if check is not None and isinstance(model, modeling_utils.PreTrainedModel):
        check(model.state_dict(), model)


def _write_tokenizer(tokenizer, folder: Path) -> None:
    if tokenizer is None:
        return
    if not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer: expected one with save_pretrained, got {type(tokenizer).__name__}")
    with _refusals("tokenizer"):
        tokenizer.save_pretrained(folder)


@contextmanager
def _refusals(argument: str) -> Iterator[None]:
    """Name the argument that transformers refuses to save. What the disk or safetensors raises is passed on."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        reason = " ".join(str(error).split())
        raise ValueError(f"{argument}: expected one that transformers can save; it says: {reason}") from error


def in_format(model: torch.nn.Module, format: str) -> torch.nn.Module:
    """Return the model as it is saved: itself, or a copy that shares with it what has the same form in both."""
    if format == DENSE:
        return unpacked_copy(model) if is_packed(model) else model
    return packed_copy(model, format)


def check_format(format: str) -> None:
    """Raise `ValueError` unless `format` is one to save in."""
    if format not in (DENSE, PACKED):
        try:
            format_of(format)
        except (TypeError, ValueError) as error:
            raise ValueError(f"format: expected 'dense', 'packed', 'bitmask' or 'N:M', got {format!r}") from error


def check_space(model: torch.nn.Module, path: str | os.PathLike, *, argument: str = "out", extra: int = 0) -> None:
    """Raise `OSError` (ENOSPC) unless the disk of `path` has room for the weights.

    Args:
        model: the model to be saved.
        path: the folder, which need not exist.
        argument: names `path` in messages.
        extra: bytes that are needed besides; negative for what is on the disk already.
    """
    needed = weight_bytes(model) + extra
    existing = Path(path).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"{argument}: no space left: the weights need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, message, str(path))
