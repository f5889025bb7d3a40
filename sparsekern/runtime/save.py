"""Saving of models: checks of everything that could be refused, then the writing of the folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .._checks import on_one_line
from .._files import disk_errors
from ..models.adapters import check_no_adapter
from ..models.scaled_weights import restore_scales
from ..models.stored_files import Part, write_stored_tensors
from ..models.streaming import Stream, stream_of
from .card import model_card
from .card_data import CARD
from .carry import carried_bytes, carry_files, carry_tensors, warn_of_what_stays_behind
from .config_file import correct_config
from .hub import check_push, push
from .int8_head import check_head
from .output import OutputFolder, check_model_folder, check_not_a_model
from .packing import PACKED, check_packed_format, is_packed, packed_copy, unpacked_copy, weight_bytes
from .streamed import merged, packed_layers, write_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"
BLOCKS = ".blocks"  # the folder, inside the one that is written, of the blocks of a streamed model


def save(
    model: torch.nn.Module,
    path: str | os.PathLike,
    format: str = "dense",
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    head: str | None = None,
) -> Path:
    """Save a pruned model so that plain `AutoModelForCausalLM.from_pretrained(path)` loads it.

    `config.json` is written last, so the folder is loadable only once it is complete. The model is not changed.

    Of a model that `sparsekern.load` loaded, whatever else its folder held is saved too, unchanged: tensors that its class does not
    know, and files other than weights. See `load`. Of a model that another program loaded, a warning names what stays behind.

    Args:
        model: a transformers model, dense or packed by `sparsekern.pack`.
        path: a new or empty folder.
        format: `"dense"` stores the zeros like other weights, so every loader takes the folder. `"packed"` packs the linears that get
            smaller, each in its smallest fitting format; packed ones keep theirs. `"bitmask"` or `"N:M"` packs in that format only.
            To load a packed folder, `import sparsekern` first.
        tokenizer: a tokenizer to save to the folder as well.
        overwrite: replace the model in `path`: its weights, configs, card and reports. Other files stay.
        push_to_hub: `"user/name"`, a repository of the Hugging Face hub to push the saved files to, in one commit. It is made if it
            is missing. The token of the hub is asked for before anything is written.
        head: `"int8"` rounds the head to 8 bits in a packed format, and embeddings that are tied to it, as `pack` does. None leaves it as
            it is.

    Returns:
        `path` with links resolved.

    Raises:
        TypeError: `model` or `tokenizer` has no `save_pretrained`, or `push_to_hub` is not a text.
        ValueError: the format is unknown, no linear gets smaller by packing, transformers refuses to save the model or the tokenizer,
            the model has adapters, a streamed model is read from `path`, the folder that it was loaded from is gone, another call is
            saving to the folder, or `push_to_hub` is no repository that the hub's token may write to. With `head`: the format is
            `"dense"`, the model is streamed, or `pack` refuses it.
        FileExistsError: `path` is a file or a folder with other content; with `overwrite`, a folder without a model.
        OSError: no space is left, or the folder cannot be written to. Nothing is left behind then. Or the hub cannot be reached, or
            refuses the push; the folder is complete then, and the message says how to push it.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "2:4", progress=False)
        >>> path = sparsekern.save(model, "packed", format="packed", tokenizer=tokenizer)
        >>> sparsekern.load(path).model.layers[0].mlp.up_proj.format
        '2:4'
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    check_no_adapter(model)
    check_format(format)
    _check_head(model, head, format)
    if push_to_hub is not None:
        check_push(push_to_hub)
    warn_of_what_stays_behind(model)
    with OutputFolder.held(path, "path", check_model_folder if overwrite else check_not_a_model) as folder:
        _check_not_source(model, folder.path)
        model = in_format(model, format, head)
        check_space(model, folder.path, argument="path", extra=carried_bytes(model))
        with folder.staged(replace=overwrite) as staging:
            write_model(model, staging, tokenizer, format)
            (staging / CARD).write_text(model_card(model, packed=format != DENSE), encoding="utf-8")
            files = [file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file()]
    if push_to_hub is not None:
        push(folder.path, push_to_hub, files)
    return folder.path


def _check_head(model: torch.nn.Module, head: str | None, format: str) -> None:
    """Raise `ValueError` if a head is asked for that the folder cannot have."""
    check_head(head)
    if head is not None and format == DENSE:
        raise ValueError(f"head: expected None for format={DENSE!r}, got {head!r}; format={PACKED!r} takes it")
    if head is not None and stream_of(model) is not None:
        raise ValueError(f"head: expected None for a streamed model, got {head!r}; load it without stream=True")


def _check_not_source(model: torch.nn.Module, folder: Path) -> None:
    """Raise `ValueError` if a streamed model is read from the folder."""
    stream = stream_of(model)
    if stream is not None and any(stored.path.resolve().parent == folder for stored in stream.stored.values()):
        raise ValueError(f"path: expected another folder than {str(folder)!r}, from which the streamed model is read")


def _save_pretrained(model: torch.nn.Module, save_directory: str | os.PathLike, **options: object) -> None:
    """Save a streamed model, as its `save_pretrained` does that of a model in memory: dense, or packed if it was loaded packed."""
    if options:
        raise ValueError(
            f"save_pretrained: expected only a folder for a streamed model, got {', '.join(sorted(options))}; load it without stream=True"
        )
    save(model, save_directory, PACKED if is_packed(model) else DENSE, overwrite=True)


Stream.save = _save_pretrained


def write_model(model: torch.nn.Module, folder: Path, tokenizer: Any = None, format: str = DENSE) -> list[Part]:
    """Write weights, configs and tokenizer to `folder`, and what the model's source held beside them.

    Args:
        model: a model in the format to save, or a streamed one, whose blocks are brought into it one at a time.
        folder: an empty folder.
        tokenizer: saved with the model; None saves none.
        format: the format of a streamed model.

    Returns:
        The parts of a streamed model that are stored in another form than before.

    Raises:
        TypeError: `tokenizer` has no `save_pretrained`.
        ValueError: transformers refuses to save the model or the tokenizer, or the source has changed.
        OSError: the disk refuses; `errno` gives the reason.
    """
    restore_scales(model)
    parts: list[Part] = []
    if (stream := stream_of(model)) is None:
        _write_configs(model, folder, tokenizer)
        carry_tensors(model, folder)
        _finish(model, folder, tokenizer)
        return parts
    blocks = folder / BLOCKS
    parts = write_parts(model, stream, blocks, format)
    with _described_as_packed(model, stream, parts):
        _write_configs(model, folder, tokenizer)
        stream.check_unchanged()
        write_stored_tensors(merged(stream, parts, blocks), folder)
        shutil.rmtree(blocks)
        _finish(model, folder, tokenizer)
    return parts


def _write_configs(model: torch.nn.Module, folder: Path, tokenizer: Any) -> None:
    of: Any = model
    with disk_errors(folder), _refusals("model"):
        if stream_of(model) is None:
            of.save_pretrained(folder)  # with its weights
        else:
            type(of).save_pretrained(of, folder, state_dict={})
    _write_tokenizer(tokenizer, folder)


def _finish(model: torch.nn.Module, folder: Path, tokenizer: Any) -> None:
    carry_files(model, folder, tokenizer)
    correct_config(model, folder)


@contextmanager
def _described_as_packed(model: torch.nn.Module, stream: Stream, parts: Sequence[Part]) -> Iterator[None]:
    """Let the config of a streamed model describe the packed layers in its files within."""
    rewritten = {part.index for part in parts}
    layers = packed_layers([part for index, part in stream.parts.items() if index not in rewritten] + list(parts))
    if not layers:
        yield
        return
    from . import hf_quantizer

    hf_quantizer.mark(cast("PreTrainedModel", model), layers)
    try:
        yield
    finally:
        hf_quantizer.unmark(cast("PreTrainedModel", model))


def check_saveable(model: torch.nn.Module, tokenizer: Any, folder: OutputFolder) -> None:
    """Save all but the weights to a scratch folder, to find out before the work what transformers refuses.

    Args:
        model: the model to save later, before or after pruning.
        tokenizer: the tokenizer to save with it, or None.
        folder: the output folder.

    Raises:
        TypeError: `model` or `tokenizer` has no `save_pretrained`.
        ValueError: transformers refuses to save the model or the tokenizer.
        OSError: the folder cannot be written to.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"out: expected a model with save_pretrained, got {type(model).__name__}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"out: expected a model that transformers can save, got one that it loaded as {getattr(method, 'value', method)}; "
            "load it with sparsekern.load, or save it dense and load that"
        )
    of = cast("PreTrainedModel", model)
    with _disk_of(folder), folder.scratch() as scratch:
        with _refusals("model"):
            if hasattr(of, "config"):
                of.config.save_pretrained(scratch)
            if hasattr(of, "can_generate") and of.can_generate() and of.generation_config is not None:
                of.generation_config.save_pretrained(scratch)
            _check_shared_weights(model)
        _write_tokenizer(tokenizer, scratch)


@contextmanager
def _disk_of(folder: OutputFolder) -> Iterator[None]:
    """Name the output folder in errors of its disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"out: the folder {str(folder.path)!r} cannot be written to ({error.strerror})") from error


def _check_shared_weights(model: torch.nn.Module) -> None:
    """Raise the error of `save_pretrained` for weights that share memory, if this transformers exposes the check."""
    from transformers import modeling_utils

    check = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if check is not None and isinstance(model, modeling_utils.PreTrainedModel):
        check(model.state_dict(), model)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer: expected one with save_pretrained, got {type(tokenizer).__name__}")
    with _refusals("tokenizer"):
        tokenizer.save_pretrained(folder)


@contextmanager
def _refusals(argument: str) -> Iterator[None]:
    """Turn an error of transformers into a `ValueError` that names the argument. Errors of the disk pass through."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, MemoryError):
        raise
    except Exception as error:  # the tokenizers package raises bare exceptions
        raise ValueError(f"{argument}: expected one that transformers can save; it says: {on_one_line(error)}") from error


def in_format(model: torch.nn.Module, format: str, head: str | None = None) -> torch.nn.Module:
    """Return the model in the format to save: itself, or a copy that shares the unchanged tensors; a streamed one as it is."""
    if stream_of(model) is not None:
        return model
    if format == DENSE:
        return unpacked_copy(model) if is_packed(model) else model
    return packed_copy(model, format, head=head)


def check_format(format: str) -> None:
    """Raise `ValueError` unless a model can be saved in `format`."""
    check_packed_format(format, besides=(DENSE,))


def check_space(model: torch.nn.Module, path: str | os.PathLike, *, argument: str = "out", extra: int = 0) -> None:
    """Raise `OSError` (ENOSPC) unless the disk of `path` has room for the weights.

    Args:
        model: the model to save.
        path: the folder, which need not exist.
        argument: name of `path` in messages.
        extra: further bytes to write; negative for bytes that are on the disk already.
    """
    needed = weight_bytes(model) + extra
    existing = Path(path).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = (
            f"{argument}: no space left: expected {needed / 1e6:,.0f} MB for the weights, got {free / 1e6:,.0f} MB that are free"
        )
        raise OSError(errno.ENOSPC, message, str(path))
