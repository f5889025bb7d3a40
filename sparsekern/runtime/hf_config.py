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
MARKS = ("bitmask", "codes")  # of these, any packed layer has one beside its values
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
        if not isinstance(entry, Mapping) or not {"format", "shape", "dtype"} <= set(entry) <= {
            "format",
            "shape",
            "dtype",
            "stored",
        }:
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


def names_of(layer: str, prefix: str) -> tuple[str, str, str]:
    """What a layer may be called: as it is, or as in the base of its model, or as in the model whose base it is in."""
    return layer, layer.removeprefix(f"{prefix}."), f"{prefix}.{layer}"


def check_headers(
    files: Iterable[str | Path], layers: Mapping[str, PackedLayer], *, prefix: str = "", renamed: bool = False
) -> dict[str, str]:
    """Check names, shapes and dtypes of all packed tensors before one is read.

    Args:
        files: safetensors files.
        layers: by name.
        prefix: of the model's base; the layers may be named with it in the files and without it in `layers`, or the other way round.
        renamed: the tensors may have other names in the files, so one that is not found is no error yet.

    Returns:
        The file of each tensor that was found.

    Raises:
        ValueError: a damaged file; a tensor that is missing or not as `config.json` has it, or of a layer that `config.json` does not
            have. The message names file and tensor.
    """
    from safetensors import SafetensorError, safe_open

    held: dict[str, tuple[str, tuple[int, ...], str]] = {}  # file, shape and dtype of each tensor
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensor = opened.get_slice(name)
                    held[name] = file.name, tuple(tensor.get_shape()), tensor.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{file.name}: the file is damaged ({error})") from error
    expected: dict[str, Spec] = {}
    for layer, entry in layers.items():
        specs = entry.tensors()
        called = next((name for name in names_of(layer, prefix) if any(f"{name}.{part}" in held for part in specs)), layer)
        expected |= {f"{called}.{part}": spec for part, spec in specs.items()}
    found = {name: held[name] for name in sorted(expected.keys() & held.keys())}
    for name, (file, shape, dtype) in found.items():
        _check_tensor(f"{file}: {name}", shape, dtype, expected[name])
    if not renamed:
        if missing := sorted(expected.keys() - found.keys()):
            raise ValueError(
                f"{', '.join(Path(file).name for file in files)}: {missing[0]}: is missing ({len(missing)} tensors in all)"
            )
        _check_all_named(held, expected)
    return {name: file for name, (file, _, _) in found.items()}


def _check_all_named(held: Mapping[str, tuple], expected: Iterable[str]) -> None:
    """A packed layer that is not named would stay dense, with random numbers for its weight."""
    named = {name.rpartition(".")[0] for name in expected}
    for name in sorted(held):
        layer, _, part = name.rpartition(".")
        if part in MARKS and f"{layer}.values" in held and layer not in named:
            raise ValueError(f"{held[name][0]}: {name}: belongs to a packed layer, but quantization_config.layers has no {layer!r}")


def _check_tensor(where: str, shape: tuple[int, ...], dtype: str, expected: Spec) -> None:
    expected_dtype = NAME_IN_HEADER[expected.dtype]
    if (shape, dtype) != (expected.shape, expected_dtype):
        raise ValueError(f"{where}: expected {expected_dtype} {list(expected.shape)} by config.json, got {dtype} {list(shape)}")
