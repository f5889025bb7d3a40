"""What `config.json` says of a packed model, and whether the weight files hold that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .formats import Spec, check_shape, format_of
from .sparse_linear import DTYPES, SparseLinear

METHOD = "sparsekern"  # quantization_config.quant_method
VERSION = 1  # of the layouts and of these entries

DTYPE_OF_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
NAME_IN_HEADER = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class PackedLayer:
    """One packed layer: its format, the shape and dtype of its weight, and how many values are stored where that may vary."""

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    stored: int | None = None

    @classmethod
    def of(cls, layer: SparseLinear) -> PackedLayer:
        return cls(layer.format, layer.shape, layer.dtype, format_of(layer.format).stored(layer.tensors))

    @classmethod
    def from_dict(cls, name: str, entry: object) -> PackedLayer:
        """Raise `ValueError`, naming the entry and what is wrong with it, unless it can be read safely."""
        where = f"config.json: quantization_config.layers[{name!r}]"
        if not isinstance(entry, Mapping) or not {"format", "shape", "dtype"} <= set(entry) <= {"format", "shape", "dtype", "stored"}:
            raise ValueError(f"{where}: expected format, shape, dtype and, of a bitmask, stored; got {entry!r}")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPE_OF_NAME:
            raise ValueError(f"{where}.dtype: expected one of {', '.join(DTYPE_OF_NAME)}, got {entry['dtype']!r}")
        try:
            layer = cls(entry["format"], check_shape(entry["shape"]), DTYPE_OF_NAME[entry["dtype"]], entry.get("stored"))
            layer.tensors()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        return layer

    def to_dict(self) -> dict[str, object]:
        dtype = str(self.dtype).removeprefix("torch.")
        entry = {"format": self.format, "shape": list(self.shape), "dtype": dtype}
        return entry if self.stored is None else {**entry, "stored": self.stored}

    def tensors(self) -> dict[str, Spec]:
        """The shape and dtype of each packed tensor."""
        return format_of(self.format).specs(self.shape, self.dtype, self.stored)

    def empty(self, bias: nn.Parameter | None, *, conv1d: bool) -> SparseLinear:
        """A layer on the meta device, to be loaded into."""
        tensors = format_of(self.format).empty(self.shape, self.dtype, self.stored, device="meta")
        return SparseLinear(self.format, self.shape, tensors, bias, conv1d=conv1d)


def describe(model: nn.Module) -> dict[str, dict[str, object]]:
    """`quantization_config.layers` of a packed model."""
    return {name: PackedLayer.of(layer).to_dict() for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}


def parse_layers(layers: object) -> dict[str, PackedLayer]:
    """Raise `ValueError` unless all of `quantization_config.layers` can be read safely."""
    if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"config.json: quantization_config.layers: expected an entry for each packed layer, got {layers!r}")
    return {name: PackedLayer.from_dict(name, entry) for name, entry in layers.items()}


def check_headers(files: Iterable[str | Path], layers: Mapping[str, PackedLayer], *, renamed: bool = False) -> dict[str, str]:
    """Check shapes and dtypes of all packed tensors before one is read.

    Args:
        files: safetensors files.
        layers: by name.
        renamed: the tensors may have other names in the files, so one that is not found is no error yet.

    Returns:
        The file of each tensor that was found.

    Raises:
        ValueError: a damaged file; a tensor that is missing or not as `config.json` has it. The message names file and tensor.
    """
    from safetensors import SafetensorError, safe_open

    files = [Path(file) for file in files]
    expected = {f"{layer}.{name}": spec for layer, entry in layers.items() for name, spec in entry.tensors().items()}
    found: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in expected.keys() & set(opened.keys()):
                    found[name] = file.name
                    tensor = opened.get_slice(name)
                    _check_tensor(f"{file.name}: {name}", tuple(tensor.get_shape()), tensor.get_dtype(), expected[name])
        except SafetensorError as error:
            raise ValueError(f"{file.name}: the file is damaged ({error})") from error
    missing = sorted(expected.keys() - found.keys())
    if missing and not renamed:
        raise ValueError(f"{', '.join(file.name for file in files)}: {missing[0]}: is missing ({len(missing)} tensors in all)")
    return found


def _check_tensor(where: str, shape: tuple[int, ...], dtype: str, expected: Spec) -> None:
    expected_dtype = NAME_IN_HEADER[expected.dtype]
    if (shape, dtype) != (expected.shape, expected_dtype):
        raise ValueError(f"{where}: expected {expected_dtype} {list(expected.shape)} by config.json, got {dtype} {list(shape)}")
