"""`pack` and `unpack`: replace the linears and experts of a model by packed ones where that saves memory, and back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from types import ModuleType

import torch
from torch import nn

from .._counts import most_in_group, nonzeros
from ..models.globs import Globs
from ..models.streaming import refuse_streamed, stream_of
from ..models.zeros import count_stored
from .expert_formats import layout_of
from .formats import INT8, format_of, q4_names
from .int8_head import check_head, check_ties, find_head, untie
from .packable import Packable, check_no_hooks, check_not_offloaded, chosen_packables, find_packables
from .packed_weight import PackedWeight

PACKED = "packed"  # the smallest fitting format of each weight


def pack(
    model: nn.Module, format: str = PACKED, *, include: Globs = None, exclude: Globs = None, head: str | None = None
) -> nn.Module:
    """Replace each linear that gets smaller by a `SparseLinear`, in place, and the weights of fused experts likewise.

    A parameter that holds a matrix of all experts of a layer is packed as a whole. The module of experts stays, and multiplies by the
    packed weights of the experts that tokens are routed to. Globs may name the parameter, as `*.experts.down_proj`, or its matrices.

    Three kinds of linears are left dense: those that share their weight with another module, such as an `lm_head` tied to the
    embeddings; those of other dtypes than float32, bfloat16 and float16; and unknown subclasses of `nn.Linear`.

    `head="int8"` rounds the head to 8 bits with a scale for each row, and reads half of its bytes for each token. Embeddings that are tied
    to it read the same tensor, so that it is stored once. Everything else of packing leaves each number as it is.

    `.to(dtype)` converts a packed model to float32, bfloat16 or float16. transformers refuses `.half()` and `.float()`, since it treats
    a packed model as quantised. A packed layer refuses other dtypes, after the modules before it were converted: call `unpack` first.

    Args:
        model: a pruned model, or any module with pruned linears, changed one layer at a time. Pass the whole transformers model, not
            its base.
        format: `"packed"` chooses the smallest format that each weight fits, and leaves packed layers unchanged. For a pattern such as
            1:4 that format may be slower on a CPU than `"bitmask"`. `"bitmask"` or `"N:M"` uses that format only: layers in another
            are repacked, or made dense if they do not fit. Weights that `prune(values="int4")` made fit `"2:4-q4"`, `"1:4-q4"` or
            `"4:16-q4"`, whose products round their input to 8 bits.
        include: names or globs of linears to pack, such as `"*.mlp.*"`. None is all linears.
        exclude: names or globs of linears to leave unchanged.
        head: `"int8"` rounds the head of the model to 8 bits, and embeddings that are tied to it. None leaves it as it is.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the format is unknown, a glob matches nothing, a layer has hooks that would be lost, the model is offloaded or
            quantised by another program, or no linear can be packed or gets smaller. With `head`: there is no head, or it is tied to
            more than plain embeddings.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "2:4", progress=False)
        >>> packed = sparsekern.pack(model)
        >>> packed.model.layers[0].mlp.up_proj.format
        '2:4'
    """
    return _pack(model, format, include, exclude, head, keep_hooks=True)


def _pack(
    model: nn.Module,
    format: str,
    include: Globs = None,
    exclude: Globs = None,
    head: str | None = None,
    *,
    keep_hooks: bool,
) -> nn.Module:
    check_module(model)
    refuse_streamed(model, "whose weights are in its folder")
    check_packed_format(format)
    check_head(head)
    transformers_side = _transformers_side(model)
    if transformers_side:
        transformers_side.check_unmarked(model)
    own_head = None if head is None else find_head(model)
    found = chosen_packables(model, include, exclude)
    if own_head is not None:
        found.pop(own_head.name, None)
    todo = {name: known for name, known in found.items() if not known.is_packed_as(format)}
    chosen = {name: smallest(known.dense, format) for name, known in todo.items()}
    if head is None and len(todo) == len(found) and not any(chosen.values()):
        raise ValueError(
            f"model: none of its {len(found)} linear layers gets smaller with format={format!r}; "
            f"{_share_of_zeros(found.values()):.1%} of their weights are zero"
        )
    changed = {name: best for name, best in chosen.items() if best is not None or todo[name].packed is not None}
    if keep_hooks:
        for name in changed:
            check_no_hooks(todo[name], "packing")
        if own_head is not None:
            own_head.check_no_hooks()
    if own_head is not None:  # first, since it alone may be refused for its values
        own_head.put(model)
    for name, best in changed.items():
        todo[name].put(best)
    if transformers_side:
        transformers_side.mark(model)
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Replace each `SparseLinear` by a dense layer and packed experts by dense ones, in place.

    Args:
        model: a packed model, or any module. One without packed layers is left unchanged.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a layer has hooks that would be lost, or the model is offloaded.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "2:4", progress=False)
        >>> dense = sparsekern.unpack(sparsekern.pack(model))
        >>> type(dense.model.layers[0].mlp.up_proj).__name__
        'Linear'
    """
    return _unpack(model, keep_hooks=True)


def _unpack(model: nn.Module, *, keep_hooks: bool) -> nn.Module:
    check_module(model)
    found = find_packables(model, only_packed=True)
    for known in found.values():
        check_not_offloaded(known)
        if keep_hooks:
            check_no_hooks(known, "unpacking")
    if keep_hooks:
        check_ties(model)
    for known in found.values():
        known.put(None)
    untie(model)
    if transformers_side := _transformers_side(model):
        transformers_side.unmark(model)
    return model


def packed_copy(model: nn.Module, format: str = PACKED, *, head: str | None = None) -> nn.Module:
    """Return a packed copy of `model` that shares all unchanged tensors. Packed layers lose their hooks."""
    return _pack(_sharing_copy(model), format, head=head, keep_hooks=False)


def unpacked_copy(model: nn.Module) -> nn.Module:
    """Return a dense copy of a packed model that shares all unchanged tensors. Unpacked layers lose their hooks."""
    return _unpack(_sharing_copy(model), keep_hooks=False)


def check_packed_format(format: str, besides: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` unless `format` is a packed format, or one of `besides`."""
    if format in (PACKED, *besides):
        return
    expected = f"format: expected {', '.join(map(repr, (*besides, PACKED)))}, 'bitmask', 'N:M' or 'N:M-q4', got {format!r}"
    try:
        found = format_of(format)
    except (TypeError, ValueError) as error:
        raise ValueError(expected) from error
    if found.name == INT8:
        raise ValueError(f"{expected}, which is for the head: head='int8'")


def is_packed(model: nn.Module) -> bool:
    """Return whether a model has packed layers."""
    return any(isinstance(module, PackedWeight) for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers in memory, or of a streamed model's checkpoint.

    Shared storage counts once.
    """
    if (stream := stream_of(model)) is not None:
        return stream.size()
    storages = [tensor.untyped_storage() for tensor in chain(model.parameters(), model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """Return the number of zeros and of all weights of a model, packed ones included."""
    zeros, total = count_stored(model)  # of a packed weight its stored values
    for layer in model.modules():
        if isinstance(layer, PackedWeight) and layer.owns_tensors:
            size, known = torch.Size(layer.shape).numel(), layer.stored_values
            zeros, total = zeros + size - known, total + size - known
            values_are_counted = any(isinstance(tensor, nn.Parameter) for tensor in layer.tensors.values())
            if not values_are_counted and layer.device.type != "meta":
                zeros, total = zeros + known - layer.layout.nonzeros(layer.tensors, layer.shape), total + known
    return zeros, total


def smallest(weight: torch.Tensor, format: str = PACKED) -> str | None:
    """Return the smallest format that fits `weight`, or None if dense is smaller.

    Args:
        weight: `[out_features, in_features]`, or `[experts, out_features, in_features]`, dense.
        format: `"packed"` considers all formats, another name only that format.
    """
    best, fewest = None, weight.numel() * weight.element_size()
    for name in _fitting(weight) if format == PACKED else [format]:
        try:
            packed = layout_of(name, tuple(weight.shape)).packed_bytes(weight)
        except ValueError:  # it does not fit
            continue
        if packed < fewest:
            best, fewest = name, packed
    return best


def _fitting(weight: torch.Tensor) -> Iterator[str]:
    yield from q4_names(weight)
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
    for m in (4, 8, 16):
        if weight.shape[-1] % m == 0 and weight.numel():
            n = max(1, max(int(most_in_group(own, m)) for own in matrices))
            if n < m:
                yield f"{n}:{m}"
    yield "bitmask"


def _share_of_zeros(found: Iterable[Packable]) -> float:
    zeros = total = 0
    for known in found:
        weight = known.dense
        zeros, total = zeros + weight.numel() - int(nonzeros(weight)), total + weight.numel()
    return zeros / max(1, total)


def check_module(model: nn.Module) -> None:
    """Raise `TypeError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")


def _sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares all parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _transformers_side(model: nn.Module) -> ModuleType | None:
    """Return the module that marks a transformers model as packed, or None for another module."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    from . import hf_quantizer

    return hf_quantizer
