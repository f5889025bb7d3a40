"""Models as GGUF files, which llama.cpp and the programs around it run."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import replace_atomically
from .._warnings import warn
from ..methods import check_choice
from ..models.streaming import refuse_streamed
from .architectures import Architecture, add_parameters, architecture_of
from .gguf_tensors import OF_DTYPE, TYPES, Stored, rounded_rows, tensors_of, type_of
from .vocabulary import Vocabulary, add_vocabulary, vocabulary_of

SUFFIX = ".gguf"
METADATA = 64 * 2**20  # bytes that are allowed for all but the tensors


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    type: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write a model as a GGUF file, which llama.cpp runs.

    A linear whose values have 4 bits (`prune(values="int4")`) is stored as Q4_0 without loss: the numbers of a packed folder such as
    `2:4-q4`, with the zeros written out. So llama.cpp can run exactly the weights that `2:4-q4` stores. A dense float32 model has the same
    numbers; one in a half dtype had rounded them. A head that `pack(head="int8")` made is stored as Q8_0, without loss, except rows whose
    scale float16 does not hold; a warning counts them. Norms and biases are float32.

    The families are LLaMA (also SmolLM2, TinyLlama), Mistral, Qwen2 and Qwen3. A tensor is in memory at a time, besides the model.

    Args:
        model: a causal language model of transformers, dense or packed.
        path: the file, whose name ends in `.gguf`.
        tokenizer: its tokenizer, with a chat template if it has one. A file without one runs on token ids only.
        type: type of all other matrices: `"auto"` keeps the dtype of each, so that nothing is rounded; `"f32"`, `"f16"`, `"bf16"`; `"q8_0"`
            and `"q4_0"` round to blocks of 32 weights. With `"q4_0"`, embedding and head become Q8_0.
        overwrite: replace a file.

    Returns:
        `path` with links resolved.

    Raises:
        ImportError: the package `gguf` is not installed.
        TypeError: `tokenizer` is no tokenizer of transformers.
        ValueError: llama.cpp has no such family of models or kind of tokenizer; the model is streamed; a weight is too large for float16;
            an unknown type.
        FileExistsError: the file exists.
        OSError: no space is left, or the file cannot be written. Nothing is left behind then.

    Example:
        >>> report = sparsekern.prune(model, "sparsegpt", "2:4", ids, values="int4", progress=False)
        >>> sparsekern.export_gguf(model, "model.gguf").name
        'model.gguf'
    """
    check_gguf()
    check_choice("type", type, TYPES)
    file = checked_file(path, overwrite=overwrite)
    refuse_streamed(model, "whose weights are in its folder")
    architecture = architecture_of(model)
    _check_weights(model)
    config: Any = model.config
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, config.vocab_size)
    tensors = tensors_of(model, architecture, type)
    if rows := rounded_rows(tensors):
        warn(f"{rows} rows of 8-bit values are rounded again, since float16 does not hold their scales", stacklevel=2)
    _check_space(file, tensors)
    replace_atomically(file, lambda temporary: _write(temporary, file.stem, config, architecture, vocabulary, tensors))
    return file


def _check_weights(model: Any) -> None:
    """Raise `ValueError` unless a model has a head, whose place llama.cpp would fill, and weights of a dtype that the file can hold."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"model: expected a causal language model with a head, got {type(model).__name__}")
    others = sorted({str(value.dtype) for value in model.parameters() if value.is_floating_point() and value.dtype not in OF_DTYPE})
    if others:
        raise ValueError(f"model: expected weights in float32, float16 or bfloat16, got {', '.join(others)}")


def check_gguf() -> None:
    """Raise `ImportError` unless the package gguf is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("gguf is needed to write GGUF files: pip install 'sparsekern[gguf]'")


def checked_file(path: str | os.PathLike, *, overwrite: bool) -> Path:
    """Return the path of a file to write, with `~` expanded and links resolved.

    Raises:
        TypeError: it is no path.
        ValueError: its name does not end in `.gguf`.
        FileNotFoundError: its folder is missing.
        FileExistsError: it exists.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the path of a file, got {path!r}")
    file = Path(path).expanduser().resolve()
    if file.suffix != SUFFIX:
        raise ValueError(f"path: expected a file name that ends in {SUFFIX}, got {file.name!r}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"path: expected an existing folder for {file.name!r}, got {str(file.parent)!r}")
    if file.is_dir() or (file.exists() and not overwrite):
        raise FileExistsError(f"path: {str(file)!r} exists; pass overwrite=True to replace a file")
    return file


def summary_of(file: Path) -> str:
    """Return a line of the types in a file, and its bits a weight."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    counts = Counter(tensor.tensor_type.name for tensor in tensors)
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    shown = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{shown}; {8 * file.stat().st_size / weights:.2f} bits a weight, {file.stat().st_size / 1e6:,.1f} MB"


def _check_space(file: Path, tensors: Sequence[Stored]) -> None:
    needed, free = METADATA + sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(file.parent).free
    if free < needed:
        message = f"path: no space left: expected {needed / 1e6:,.0f} MB for the file, got {free / 1e6:,.0f} MB that are free"
        raise OSError(errno.ENOSPC, message, str(file))


def _write(
    file: Path, name: str, config: Any, architecture: Architecture, vocabulary: Vocabulary | None, tensors: Sequence[Stored]
) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    writer = GGUFWriter(file, architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(_file_type(tensors, LlamaFileType)))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_parameters(writer, config)
    add_vocabulary(writer, vocabulary)
    for tensor in tensors:
        shape, dtype, raw = _described(tensor)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data())
    finally:
        writer.close()


def _described(tensor: Stored) -> tuple[tuple[int, ...], Any, Any]:
    """Return shape, dtype and type of a tensor as `GGUFWriter.add_tensor_info` takes them."""
    import numpy

    if tensor.kind in ("f32", "f16"):
        return tensor.shape, numpy.dtype(f"float{tensor.kind[1:]}"), None
    return (*tensor.shape[:-1], tensor.nbytes // torch.Size(tensor.shape[:-1]).numel()), numpy.dtype("uint8"), type_of(tensor.kind)


def _file_type(tensors: Sequence[Stored], types: Any) -> Any:
    """Return the `gguf.LlamaFileType` of most weights."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.kind] += torch.Size(tensor.shape).numel()
    kind = weights.most_common(1)[0][0]
    return types.ALL_F32 if kind == OF_DTYPE[torch.float32] else types[f"MOSTLY_{kind.upper()}"]
