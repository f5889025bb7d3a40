"""The description of packed layers in `config.json`, and checks of the weight files against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .expert_formats import layout_of
from .formats import INT8, Q4
from .int8_embedding import Int8Embedding
from .packed_format import Shape, Spec, check_shape
from .packed_weight import DTYPES, PackedWeight
from .sparse_experts import SparseExperts
from .sparse_linear import SparseLinear

METHOD = "sparsekern"  # quantization_config.quant_method
VERSION = 3  # the newest of the layouts and of these entries; 1 has no 4-bit values, 2 no 8-bit ones

DTYPE_OF_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
MARKS = ("bitmask", "codes", "scales")  # every packed layer has one of these tensors beside its values, or blocks of bytes
NAME_IN_HEADER = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class PackedLayer:
    """The description of one packed layer.

    Attributes:
        format: name of the packed format.
        shape: `(out_features, in_features)`, or `(experts, out_features, in_features)`.
        dtype: dtype of the weight.
        stored: number of stored values of a bitmask; None for N:M, whose shape determines it.
    """

    format: str
    shape: Shape
    dtype: torch.dtype
    stored: int | None = None

    @classmethod
    def of(cls, layer: PackedWeight) -> PackedLayer:
        """Describe a packed layer."""
        return cls(layer.format, layer.shape, layer.dtype, layer.layout.stored(layer.tensors))

    @classmethod
    def from_dict(cls, name: str, entry: object) -> PackedLayer:
        """Read an entry of `quantization_config.layers`.

        Raises:
            ValueError: the entry cannot be read safely. The message names the entry and its fault.
        """
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
            shape = layout_of(entry["format"], entry["shape"]).check_shape(entry["shape"])
            layer = cls(entry["format"], shape, DTYPE_OF_NAME[entry["dtype"]], entry.get("stored"))
            layer.tensors()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        return layer

    def to_dict(self) -> dict[str, object]:
        """Return the entry that `from_dict` reads."""
        dtype = str(self.dtype).removeprefix("torch.")
        entry: dict[str, object] = {"format": self.format, "shape": list(self.shape), "dtype": dtype}
        return entry if self.stored is None else {**entry, "stored": self.stored}

    def tensors(self) -> dict[str, Spec]:
        """Return the shape and dtype of each packed tensor."""
        return layout_of(self.format, self.shape).specs(self.shape, self.dtype, self.stored)

    def empty(self, bias: nn.Parameter | None, *, conv1d: bool) -> SparseLinear:
        """Return a layer on the meta device to load into."""
        tensors = self._tensors_on_meta()
        return SparseLinear(self.format, check_shape(self.shape), tensors, bias, conv1d=conv1d, dtype=self.dtype)

    def empty_embedding(self, dense: nn.Embedding) -> Int8Embedding:
        """Return embeddings on the meta device to load into, in the place of dense ones."""
        return Int8Embedding(check_shape(self.shape), self._tensors_on_meta(), padding_idx=dense.padding_idx, dtype=self.dtype)

    def empty_experts(self, stored: torch.Size, *, transposed: bool) -> SparseExperts:
        """Return the weights of experts on the meta device to load into; see `SparseExperts` for the arguments."""
        count, rows, columns = self.shape
        shape, tensors = (count, rows, columns), self._tensors_on_meta()
        return SparseExperts(self.format, shape, tensors, stored=stored, transposed=transposed)

    def _tensors_on_meta(self) -> dict[str, torch.Tensor]:
        return layout_of(self.format, self.shape).empty(self.shape, self.dtype, self.stored, device="meta")


def describe(model: nn.Module) -> dict[str, dict[str, object]]:
    """Return `quantization_config.layers` of a packed model."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedWeight) and layer.owns_tensors]
    return {name: PackedLayer.of(layer).to_dict() for name, layer in layers}


def check_entries(version: object, unknown: Iterable[str] = ()) -> None:
    """Raise `ValueError` unless `quantization_config` has this version of the layouts, and no other entries."""
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"config.json: quantization_config.version: this sparsekern reads 1 to {VERSION}, got {version!r}")
    if unknown := sorted(unknown):
        raise ValueError(f"config.json: quantization_config: unknown entry {unknown[0]!r}")


def parse_layers(layers: object) -> dict[str, PackedLayer]:
    """Read `quantization_config.layers`; raise `ValueError` unless every entry can be read safely."""
    if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"config.json: quantization_config.layers: expected an entry for each packed layer, got {layers!r}")
    return {name: PackedLayer.from_dict(name, entry) for name, entry in layers.items()}


def version_of(layers: Mapping[str, Mapping[str, object]] | None) -> int:
    """Return the version of folders with these entries: the oldest that has their formats."""
    formats = [str(entry["format"]) for entry in (layers or {}).values()]
    return 3 if INT8 in formats else 2 if any(name.endswith(Q4) for name in formats) else 1


def names_of(layer: str, prefix: str) -> tuple[str, str, str]:
    """Return the possible names of a layer: unchanged, relative to the base of its model, and inside a model with that base."""
    return layer, layer.removeprefix(f"{prefix}."), f"{prefix}.{layer}"


def check_headers(
    files: Iterable[str | Path], layers: Mapping[str, PackedLayer], *, prefix: str = "", renamed: bool = False
) -> dict[str, str]:
    """Check the names, shapes and dtypes of all packed tensors before reading any of them.

    Args:
        files: safetensors files.
        layers: the packed layers by name.
        prefix: name of the model's base. Layers may be named with it in the files and without it in `layers`, or vice versa.
        renamed: whether tensors may have other names in the files, so that a missing one is not yet an error.

    Returns:
        The file name of each tensor that was found.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, differs from `config.json`, or belongs to a layer that `config.json`
            does not list. The message names the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open

    held: dict[str, tuple[str, tuple[int, ...], str]] = {}  # file, shape and dtype of each tensor
    for path in map(Path, files):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensor = opened.get_slice(name)
                    held[name] = path.name, tuple(tensor.get_shape()), tensor.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path.name}: the file is damaged ({error})") from error
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


def _check_all_named(held: Mapping[str, tuple[str, tuple[int, ...], str]], expected: Iterable[str]) -> None:
    """Raise `ValueError` for a packed layer that `config.json` does not list.

    It would stay dense with random weights.
    """
    named = {name.rpartition(".")[0] for name in expected}
    for name in sorted(held):
        layer, _, part = name.rpartition(".")
        marks = (part in MARKS and f"{layer}.values" in held) or (part == "blocks" and held[name][2] == "U8")
        if marks and layer not in named:
            raise ValueError(f"{held[name][0]}: {name}: belongs to a packed layer, but quantization_config.layers has no {layer!r}")


def _check_tensor(where: str, shape: tuple[int, ...], dtype: str, expected: Spec) -> None:
    expected_dtype = NAME_IN_HEADER[expected.dtype]
    if (shape, dtype) != (expected.shape, expected_dtype):
        raise ValueError(f"{where}: expected {expected_dtype} {list(expected.shape)} by config.json, got {dtype} {list(shape)}")
