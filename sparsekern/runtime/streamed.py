"""Saving of streamed models: each block is read, packed where that is asked for, and written, before the next one is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import disk_errors
from ..models.checkpoint_conversion import converted_back
from ..models.stored_files import Part, Tensors
from ..models.streaming import Stream, in_memory
from ..models.weight_files import Stored, dtype_of, tensors_in
from ..models.zeros import count_block
from .expert_formats import layout_of
from .hf_config import PackedLayer
from .packable import Packable, dense_packables
from .packed_weight import PackedWeight
from .packing import PACKED, is_packed, smallest
from .sparse_experts import SparseExperts
from .sparse_linear import SparseLinear

DENSE = "dense"


def stored_part(
    model: nn.Module, stream: Stream, index: int, format: str, names: Iterable[str] | None = None
) -> tuple[Tensors, Part]:
    """Return weights as a folder of that format holds them.

    Args:
        model: the model.
        stream: its stream.
        index: a block that is in memory, or the number of blocks for weights outside the blocks.
        format: `"dense"`, or a packed format. Weights that do not get smaller stay dense.
        names: the names of parameters and buffers; None is all.

    Returns:
        The tensors under the names of the checkpoint, and what they are.
    """
    state = _state(model, stream, index)
    state = {name: state[name] for name in names} if names is not None else state
    held = set(state)
    original = converted_back(model, state)
    packed: dict[str, dict[str, Any]] = {}
    for known in dense_packables(model).values() if format != DENSE else ():
        if known.parameter_name in state and (best := smallest(known.dense, format)) is not None:
            layer = known.made(best)
            packed[known.packed_name] = _described(model, known, layer)
            del state[known.parameter_name]
            state |= {f"{known.packed_name}.{part}": tensor for part, tensor in layer.tensors.items()}
    tensors = converted_back(model, state) if packed else original
    replaced: list[str] = []
    if index == len(stream.blocks):
        read = stream.read_outside(model).items()
        replaced = sorted(name for name, targets in read if held.intersection(targets) and name not in tensors)
    return tensors, made_part(index, tensors, format, packed, replaced)


def made_part(index: int, names: Iterable[str], format: str, packed: Mapping[str, Any], replaced: Iterable[str] = ()) -> Part:
    """Return the part of a file whose packed layers are described by `packed`, which JSON can hold."""

    def decode(tensors: Tensors) -> tuple[Tensors, Tensors]:
        rest, unpacked = dict(tensors), {}
        for name, entry in packed.items():
            unpacked[entry["parameter"]] = _unpacked(name, entry, {part: rest.pop(own) for part, own in entry["tensors"].items()})
        return rest, unpacked

    return Part(index, tuple(names), format, packed, tuple(replaced), decode if packed else None)


def packed_layers(parts: Iterable[Part]) -> dict[str, dict[str, object]]:
    """Return `quantization_config.layers` of the packed layers in some parts."""
    return {name: entry["layer"] for part in parts for name, entry in part.packed.items()}


def write_parts(model: nn.Module, stream: Stream, folder: Path, format: str) -> list[Part]:
    """Write to `folder` what the files of a streamed model do not hold in `format` yet, a block at a time.

    Args:
        model: the model.
        stream: its stream, which is unchanged.
        folder: a new folder.
        format: `"dense"` or a packed format.

    Returns:
        What was written.

    Raises:
        ValueError: no weight gets smaller by packing, or the model is packed and another format is asked for.
        OSError: the disk refuses.
    """
    folder.mkdir()
    if is_packed(model):
        if format != PACKED:
            raise ValueError(
                f"format: expected {PACKED!r} for a streamed model that is packed, got {format!r}; load it without stream=True (--stream)"
            )
        return []
    parts = []
    for index in range(len(stream.blocks)):
        stored = stream.as_stored(model, index)
        part = stream.parts.get(index)
        renamed = not (part and part.packed) and stored.keys() != set(stream.names[index])  # such as a prefix that was missing
        changed = renamed or stream.is_edited(index) or bool(_differing(stream, stored))
        if not changed and _format_of(stream, index) == format:
            continue
        changed |= _format_of(stream, index) != DENSE
        with in_memory(model, index):
            tensors, part = stored_part(model, stream, index, format)
            count_block(model, index)
        if changed or part.packed:
            _write(folder / f"block-{index:05d}.safetensors", tensors)
            parts.append(part)
    outside = _write_outside(model, stream, folder, format)
    parts += [outside] if outside.names else []
    if format != DENSE and not packed_layers([*stream.parts.values(), *parts]):
        count = len(dense_packables(model))
        raise ValueError(f"model: none of its {count} linear layers gets smaller with format={format!r}")
    return parts


def merged(stream: Stream, parts: Iterable[Part], folder: Path) -> dict[str, Stored]:
    """Return the place of each tensor of a streamed model, of which `folder` holds some parts."""
    stored = dict(stream.stored)
    for part in parts:
        for name in stream.names[part.index] if part.index < len(stream.blocks) else part.replaced:
            del stored[name]
    return stored | tensors_in(sorted(folder.glob("*.safetensors")))


def _write_outside(model: nn.Module, stream: Stream, folder: Path, format: str) -> Part:
    """Write the weights outside the blocks that have another form in `format`, and return what was written."""
    index = len(stream.blocks)
    held = stream.parts.get(index)
    before = {name for entry in held.packed.values() for name in entry["tensors"].values()} if held else set()
    tensors, part = stored_part(model, stream, index, format)
    packed = {name for entry in part.packed.values() for name in entry["tensors"].values()}
    unpacked = {entry["parameter"]: None for entry in held.packed.values()} if held and not before <= packed else {}
    state = _state(model, stream, index)
    dense = converted_back(model, {name: state[name] for name in unpacked}).keys() & tensors.keys() if unpacked else set()
    changed = tensors.keys() & stream.stored.keys() if stream.is_edited(index) else set()
    targets = [target for name, found in stream.read_outside(model).items() if name in part.replaced for target in found]
    renamed = converted_back(model, {name: state[name] for name in targets if name in state}).keys() & tensors.keys()
    wanted = sorted(packed | dense | renamed | _differing(stream, tensors) | changed)
    if wanted:
        _write(folder / f"block-{index:05d}.safetensors", {name: tensors[name] for name in wanted})
    return made_part(index, wanted, format, part.packed, [*part.replaced, *sorted(before - packed)])


def _differing(stream: Stream, tensors: Tensors) -> set[str]:
    """Return the names of those tensors whose dtype or shape is another than in the checkpoint."""
    held = {name: stream.stored[name] for name in tensors.keys() & stream.stored.keys()}
    return {
        name
        for name, stored in held.items()
        if (tensors[name].dtype, tuple(tensors[name].shape)) != (dtype_of(stored), stored.shape)
    }


def _format_of(stream: Stream, index: int) -> str:
    part = stream.parts.get(index)
    return DENSE if part is None else part.format


def _state(model: nn.Module, stream: Stream, index: int) -> Tensors:
    if index < len(stream.blocks):
        name = stream.blocks[index]
        return {f"{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
    blocks = tuple(f"{name}." for name in stream.blocks)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(blocks)}


def _described(model: nn.Module, known: Packable, layer: PackedWeight) -> dict[str, Any]:
    """Return the description of a packed layer: its entry in `config.json`, and how its dense weight is made again."""
    names = {
        part: next(iter(converted_back(model, {f"{known.packed_name}.{part}": tensor}))) for part, tensor in layer.tensors.items()
    }
    transposed = layer.conv1d if isinstance(layer, SparseLinear) else isinstance(layer, SparseExperts) and layer.transposed
    return {
        "layer": PackedLayer.of(layer).to_dict(),
        "tensors": names,
        "parameter": known.parameter_name,
        "transposed": transposed,
        "stored": list(layer.stored_shape),
    }


def _unpacked(name: str, entry: Mapping[str, Any], tensors: Tensors) -> torch.Tensor:
    layer = PackedLayer.from_dict(name, entry["layer"])
    layout = layout_of(layer.format, layer.shape)
    try:
        layout.check(tensors, layer.shape, layer.dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {name} of the checkpoint cannot be loaded: {error}") from error
    dense = layout.unpack(tensors, layer.shape, layer.dtype)
    return (dense.transpose(-2, -1).contiguous() if entry["transposed"] else dense).view(entry["stored"])


def _write(path: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
