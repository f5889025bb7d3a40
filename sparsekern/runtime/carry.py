"""Tensors and files that a saved model takes over from the folder that it was loaded from, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from .._warnings import warn
from ..models.checkpoint_keys import unread_keys
from ..models.source import ATTRIBUTE, CONFIG, Source, other_files, source_of
from ..models.stored_files import shard_name, write_file, write_index
from ..models.weight_files import tensors_in, weight_files
from .sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Files that a tokenizer writes, whatever it is. Those of another tokenizer would be mixed with them.
TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json"),
}
USUAL = {"generation_config.json", "chat_template.jinja"}  # which saving a model or a tokenizer writes
REWRITTEN = {"special_tokens_map.json", "added_tokens.json"}  # which `tokenizer.json` replaces
OF_QUANTIZATION = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}


def carried_bytes(model: nn.Module) -> int:
    """Return the bytes that saving a model copies from its source.

    Raises:
        ValueError: something that would be copied is no longer there.
    """
    source = source_of(model)
    if source is None:
        return 0
    return tensor_bytes(source) + sum(path.stat().st_size for path in source.paths().values())


def tensor_bytes(source: Source | None) -> int:
    """Return the bytes of the tensors that are copied."""
    return sum(stored.nbytes for stored in source.stored().values()) if source else 0


def warn_of_what_stays_behind(model: nn.Module) -> None:
    """Warn if the folder that another program loaded a model from holds more than is saved.

    Such a model may have been changed since, so nothing is copied. Its name tells the folder.
    """
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "_name_or_path", None) or "")
    if hasattr(model, ATTRIBUTE) or folder == Path() or not (folder / CONFIG).is_file():
        return
    packed = any(isinstance(module, SparseLinear) for module in model.modules())  # whose tensors have other names
    try:
        read = weight_files(folder, getattr(config, "transformers_weights", None), getattr(type(config), "extra_files", ()))
        tensors = [] if packed else unread_keys(cast("PreTrainedModel", model), tensors_in(read))
    except (OSError, ValueError):  # the folder holds another model by now, and this one needs nothing of it
        return
    files = [name for name in other_files(folder, code=False, read=read)[0] if name not in TOKENIZER | USUAL]
    found = [f"{len(tensors)} tensors that {type(model).__name__} does not know ({tensors[0]})"] if tensors else []
    found += [f"{len(files)} files ({', '.join(files[:3])}{', …' if len(files) > 3 else ''})"] if files else []
    if found:
        warn(
            f"model: {' and '.join(found)} in {str(folder)!r} are not saved, since another program loaded the model; "
            "sparsekern.load keeps them",
            stacklevel=4,
        )


def carry_tensors(model: nn.Module, folder: Path) -> None:
    """Add a weight file with the tensors that the model's class does not know to the weights in `folder`, and an index.

    Raises:
        ValueError: a tensor is no longer there, or the model has a weight of its name.
        OSError: the disk refuses.
    """
    source = source_of(model)
    stored = source.stored() if source else {}
    if not stored:
        return
    files = weight_files(folder)
    held = tensors_in(files)
    if clash := sorted(held.keys() & stored.keys()):
        raise ValueError(f"model: {clash[0]} is both a weight of the model and one that it was loaded without")
    weight_map: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        name = shard_name(number, len(files) + 1)
        weight_map |= {tensor: name for tensor, entry in held.items() if entry.path == path}
        path.rename(folder / name)
    last = shard_name(len(files) + 1, len(files) + 1)
    write_file(folder / last, stored)
    weight_map |= dict.fromkeys(stored, last)
    size = sum(entry.nbytes for entry in (*held.values(), *stored.values()))
    write_index(folder, weight_map, size)


def carry_files(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Copy the files other than weights from the model's source to `folder`, except those that are there already.

    Args:
        model: the model.
        folder: the folder, which holds the config and the files of `tokenizer`.
        tokenizer: the tokenizer that was saved to `folder`. Files of a tokenizer from elsewhere are not mixed with those of the source.

    Raises:
        ValueError: a file is no longer there.
        OSError: the disk refuses.
    """
    source = source_of(model)
    if source is None:
        return
    left_out = set() if getattr(model, "hf_quantizer", None) is not None else set(OF_QUANTIZATION)
    if tokenizer is not None:
        left_out |= REWRITTEN if _is_of(tokenizer, source) else TOKENIZER
    for name, path in source.paths().items():
        target = folder / name
        if name not in left_out and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _is_of(tokenizer: Any, source: Source) -> bool:
    """Return whether a tokenizer was loaded from the model's folder."""
    name = str(getattr(tokenizer, "name_or_path", None) or "")
    return bool(name) and (name == source.name or Path(name).resolve() == source.folder)
