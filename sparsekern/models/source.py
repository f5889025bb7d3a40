"""What a saved model takes over from the folder that it was loaded from, beside the weights of its class.

That is the tensors that the class does not know, such as multi-token-prediction layers, and the files other than weights, such as
processors. The model remembers their names, not their bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .checkpoint_keys import RULES, check_floating, unread_keys
from .weight_files import Stored, tensors_in, weight_files

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTRIBUTE = "sparsekern_source"
CONFIG, STATE = "config.json", "state.json"
REPLACED = {CONFIG, "README.md", "report.json", "report.html"}  # in the folder itself; the output has its own
WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz", ".pkl", ".pickle"),
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".nemo", ".engine"),
}
NO_WEIGHTS = {"spk_dict.pt"}  # voices that Qwen2.5-Omni reads beside its weights
INDEXES = (".safetensors.index.json", ".bin.index.json")
CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}
# Weights that are the same model in another format, or the state of its training. Nobody needs to be told that they stay behind.
COPIES = re.compile(
    r"(model(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors|(pytorch_model|consolidated|openvino_|training_args|optimizer|scheduler|rng_state).*"
    r"|.*\.(h5|msgpack|ot|onnx|onnx_data|gguf|ggml|tflite|mlmodel|nemo|engine|npz|pkl|pickle))"
)


@dataclass(frozen=True)
class Source:
    """The folder that a model was loaded from, and the names of what is taken over from it.

    Attributes:
        folder: the folder.
        name: the name that transformers loaded the model by, a path or a hub id.
        tensors: names of the checkpoint's tensors that the model's class does not know.
        kinds: dtype, as the file names it, and shape of each of `tensors`.
        files: paths relative to the folder, with `/`, of the files other than weights of the model.
        architectures: the classes that the folder's config names.
        named: the weight file or index that the config names, None for the usual one.
        extra: further weight files that the class of the config names.
    """

    folder: Path
    name: str
    tensors: tuple[str, ...] = ()
    kinds: tuple[tuple[str, tuple[int, ...]], ...] = ()
    files: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    named: str | None = None
    extra: tuple[str, ...] = ()

    def stored(self) -> dict[str, Stored]:
        """Return the place of each of `tensors`, in the files as they are now.

        Raises:
            ValueError: one of them is no longer there, or is another.
        """
        if not self.tensors:
            return {}
        try:
            held = tensors_in(weight_files(self.folder, self.named, self.extra))
        except OSError as error:
            raise self._gone(self.tensors[0], error.strerror) from error
        for name, kind in zip(self.tensors, self.kinds, strict=True):
            if name not in held:
                raise self._gone(name, "is not there")
            if kind != (held[name].dtype, held[name].shape):
                raise self._gone(name, "is another now")
        return {name: held[name] for name in self.tensors}

    def paths(self) -> dict[str, Path]:
        """Return where each of `files` is.

        Raises:
            ValueError: one of them is no longer there, or cannot be read.
        """
        found = {name: self.folder.joinpath(*PurePosixPath(name).parts) for name in self.files}
        for name, path in found.items():
            if not path.is_file():
                raise self._gone(name, "is not there")
            if not os.access(path, os.R_OK):
                raise self._gone(name, "cannot be read")
        return found

    def _gone(self, what: str, why: str | None) -> ValueError:
        return ValueError(
            f"model: expected {what} in {str(self.folder)!r}, the folder that the model was loaded from, to save it with the model; it {why}; "
            f"restore the folder, or set `model.{ATTRIBUTE} = None` to save without its other content"
        )


def source_of(model: nn.Module) -> Source | None:
    """Return the source that `remember` set, or None."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, Source) else None


def remember(model: PreTrainedModel, folder: Path, name: str, *, code: bool) -> list[str]:
    """Set the source of a model that was loaded from `folder`, and return the names of weights that stay behind.

    Args:
        model: the model.
        folder: the folder.
        name: the name that transformers loaded the model by.
        code: whether to take over code that the folder holds.

    Raises:
        ValueError: a weight file is damaged, or holds whole numbers in the place of weights.
    """
    config = model.config
    named, extra = getattr(config, "transformers_weights", None), tuple(getattr(type(config), "extra_files", ()))
    read = weight_files(folder, named, extra)
    files, behind = other_files(folder, code=code, read=read)
    architectures = tuple(_config_entries(folder).get("architectures") or ())
    held = tensors_in(read)
    check_floating(model, {key: stored.dtype for key, stored in held.items()})
    unread = tuple(unread_keys(model, held))
    kinds = tuple((held[key].dtype, held[key].shape) for key in unread)
    source = Source(folder.resolve(), name, unread, kinds, tuple(files), architectures, named, extra)
    anything: Any = model  # nn.Module types every attribute that is set here as a tensor or a module
    setattr(anything, ATTRIBUTE, source)
    vars(model).pop(RULES, None)
    return behind


def other_files(folder: Path, *, code: bool, read: Sequence[Path] = ()) -> tuple[list[str], list[str]]:
    """Return the files of a folder that belong to its model and are not weights of it, and the weights and links that stay behind.

    Hidden files, caches, the card and the reports of an earlier run are in neither list, nor are other models in folders below.

    Args:
        folder: the folder of the model.
        code: include code.
        read: the weight files of the model itself.
    """
    folder, loaded = folder.absolute(), {path.absolute() for path in read}
    modules = module_folders(folder)
    root = folder.resolve()
    if root.parent.name == "snapshots":  # of the hub's cache, whose entries are links to `blobs` beside it
        root = root.parent.parent
    files, behind = [], []
    for path in _walk(folder, modules):
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path in loaded or name in REPLACED or name.endswith(INDEXES) or (suffix in CODE and not code):
            continue
        if not path.is_file() or not os.access(path, os.R_OK) or not path.resolve().is_relative_to(root):
            behind.append(name)
        elif suffix in WEIGHTS and path.name not in NO_WEIGHTS and modules.isdisjoint(path.parents):
            if not COPIES.fullmatch(path.name):
                behind.append(name)
        else:
            files.append(name)
    return files, behind


def _walk(folder: Path, modules: set[Path]) -> Iterator[Path]:
    """Yield the files in a folder and those below it, and folders that are links or may not be read without what is in them."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name in ("__pycache__", "lost+found"):
            continue
        if entry.is_dir() and not entry.is_symlink() and os.access(entry, os.R_OK | os.X_OK):
            if entry in modules or not _is_another_model(entry):
                yield from _walk(entry, modules)
        elif entry.exists():
            yield entry


def _is_another_model(folder: Path) -> bool:
    """Return whether a folder below holds a model of its own, or what an unfinished run keeps."""
    if (folder / CONFIG).is_file() or (folder / STATE).is_file():
        return folder.name == "checkpoint" or any(entry.suffix.lower() in WEIGHTS for entry in folder.iterdir())
    return False


def module_folders(folder: Path) -> set[Path]:
    """Return the folders of the modules that sentence-transformers puts behind the model, whose weights are not the model's."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        found = {str(module["path"]): str(module["type"]) for module in modules}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    return {folder / path for path, kind in found.items() if path and not kind.endswith(".Transformer")}


def _config_entries(folder: Path) -> dict[str, Any]:
    try:
        entries = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
