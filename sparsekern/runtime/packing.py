"""`pack` and `unpack`: replace the linears of a model by `SparseLinear` where that saves memory, and back."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import ModuleType

import torch
from torch import nn

from ..models.globs import Globs, as_globs, check_matches, matches
from ..models.linears import is_conv1d, is_plain_linear, linear_weight
from ..models.streaming import every_parameter, stream_of
from .formats import format_of
from .sparse_linear import DTYPES, SparseLinear

PACKED = "packed"  # the smallest fitting format of each weight
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def pack(model: nn.Module, format: str = PACKED, *, include: Globs = None, exclude: Globs = None) -> nn.Module:
    """Replace each linear that gets smaller by a `SparseLinear`, in place.

    Three kinds of linears are left dense: those that share their weight with another module, such as an `lm_head` tied to the
    embeddings; those of other dtypes than float32, bfloat16 and float16; and unknown subclasses of `nn.Linear`.

    `.to(dtype)` converts a packed model to float32, bfloat16 or float16. transformers refuses `.half()` and `.float()`, since it treats
    a packed model as quantised. A packed layer refuses other dtypes, after the modules before it were converted: call `unpack` first.

    Args:
        model: a pruned model, or any module with pruned linears, changed one layer at a time. Pass the whole transformers model, not
            its base.
        format: `"packed"` chooses the smallest format that each weight fits, and leaves packed layers unchanged. For a pattern such as
            1:4 that format may be slower on a CPU than `"bitmask"`. `"bitmask"` or `"N:M"` uses that format only: layers in another
            are repacked, or made dense if they do not fit.
        include: names or globs of linears to pack, such as `"*.mlp.*"`. None is all linears.
        exclude: names or globs of linears to leave unchanged.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: the format is unknown, a glob matches nothing, a layer has hooks that would be lost, the model is offloaded or
            quantised by another program, or no linear can be packed or gets smaller.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "2:4", progress=False)
        >>> packed = sparsekern.pack(model)
        >>> packed.model.layers[0].mlp.up_proj.format
        '2:4'
    """
    return _pack(model, format, include, exclude, keep_hooks=True)


def _pack(model: nn.Module, format: str, include: Globs = None, exclude: Globs = None, *, keep_hooks: bool) -> nn.Module:
    check_module(model)
    check_packed_format(format)
    transformers_side = _transformers_side(model)
    if transformers_side:
        transformers_side.check_unmarked(model)
    places = _linears(model, include, exclude)
    todo = {name: found for name, found in places.items() if not _is_packed_so(_at(found), format)}
    chosen = {name: smallest(_dense_weight(_at(found)), format) for name, found in todo.items()}
    if len(todo) == len(places) and not any(chosen.values()):
        raise ValueError(
            f"model: none of its {len(places)} linear layers gets smaller with format={format!r}; "
            f"{_share_of_zeros(places):.1%} of their weights are zero"
        )
    changed = {name: best for name, best in chosen.items() if best is not None or isinstance(_at(places[name]), SparseLinear)}
    if keep_hooks:
        for name in changed:
            _check_no_hooks(name, _at(places[name]), "packing")
    for name, best in changed.items():
        _put(places[name], _packed(name, _at(places[name]), best))
    if transformers_side:
        transformers_side.mark(model)
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Replace each `SparseLinear` by a dense layer, in place.

    Args:
        model: a packed model, or any module. One without packed layers is left unchanged.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
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
    found = _places(model, lambda module: isinstance(module, SparseLinear))
    for name, places in found.items():
        _check_not_offloaded(name, _at(places))
        if keep_hooks:
            _check_no_hooks(name, _at(places), "unpacking")
    for name, places in found.items():
        _put(places, _packed(name, _at(places), None))
    if transformers_side := _transformers_side(model):
        transformers_side.unmark(model)
    return model


def packed_copy(model: nn.Module, format: str = PACKED) -> nn.Module:
    """Return a packed copy of `model` that shares all unchanged tensors. Packed layers lose their hooks."""
    return _pack(_sharing_copy(model), format, keep_hooks=False)


def unpacked_copy(model: nn.Module) -> nn.Module:
    """Return a dense copy of a packed model that shares all unchanged tensors. Unpacked layers lose their hooks."""
    return _unpack(_sharing_copy(model), keep_hooks=False)


def check_packed_format(format: str) -> None:
    """Raise `ValueError` unless `format` is a packed format."""
    if format != PACKED:
        try:
            format_of(format)
        except (TypeError, ValueError) as error:
            raise ValueError(f"format: expected 'packed', 'bitmask' or 'N:M', got {format!r}") from error


def is_packed(model: nn.Module) -> bool:
    """Return whether a model has packed layers."""
    return any(isinstance(module, SparseLinear) for module in model.modules())


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
    zeros = total = 0
    for tensor in every_parameter(model):  # a packed weight counts its stored values here
        total += tensor.numel()
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            left_out = layer.out_features * layer.in_features - sum(
                t.numel() for t in layer.tensors.values() if t.is_floating_point()
            )
            total, zeros = total + left_out, zeros + left_out
    return zeros, total


def packable_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linears that `pack` considers by name.

    Raises:
        ValueError: there are none, or they are offloaded.
    """
    return {name: _at(places) for name, places in _linears(model, None, None).items()}


def smallest(weight: torch.Tensor, format: str = PACKED) -> str | None:
    """Return the smallest format that fits `weight`, or None if dense is smaller.

    Args:
        weight: `[out_features, in_features]`, dense.
        format: `"packed"` considers all formats, another name only that format.
    """
    best, fewest = None, weight.numel() * weight.element_size()
    for name in _fitting(weight) if format == PACKED else [format]:
        try:
            packed = format_of(name).packed_bytes(weight)
        except ValueError:  # it does not fit
            continue
        if packed < fewest:
            best, fewest = name, packed
    return best


def _fitting(weight: torch.Tensor) -> Iterator[str]:
    rows, columns = weight.shape
    for m in (4, 8, 16):
        if columns % m == 0 and weight.numel():
            n = max(1, int((weight.reshape(rows, -1, m) != 0).sum(-1).max()))
            if n < m:
                yield f"{n}:{m}"
    yield "bitmask"


Places = list[tuple[nn.Module, str]]  # all parents of one module, and its name in each


def _linears(model: nn.Module, include: Globs, exclude: Globs) -> dict[str, Places]:
    include, exclude = as_globs("include", include), as_globs("exclude", exclude)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    found = _places(model, _is_linear)
    why_not = {name: _why_not(_at(places), owners) for name, places in found.items()}
    packable = {name: places for name, places in found.items() if why_not[name] is None}
    if not packable:
        raise ValueError(_nothing_to_pack(model, Counter(reason for reason in why_not.values() if reason is not None)))
    check_matches("include", include, list(packable))
    check_matches("exclude", exclude, list(packable))
    chosen = {
        name: places
        for name, places in packable.items()
        if (include is None or matches(name, include)) and not matches(name, exclude)
    }
    if not chosen:
        raise ValueError(f"include, exclude: together they leave none of the {len(packable)} linear layers to pack")
    for name, places in chosen.items():
        _check_not_offloaded(name, _at(places))
    return chosen


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, SparseLinear)) or is_conv1d(module)


def _why_not(linear: nn.Module, owners: Mapping[int, int]) -> str | None:
    """Return the reason why a linear cannot be packed, or None if it can be or is packed."""
    if isinstance(linear, SparseLinear):
        return None
    weight = linear._parameters.get("weight")
    if weight is None:
        return "the weight is computed from other tensors"
    if not is_plain_linear(linear):
        return f"{type(linear).__name__} may do more than multiply"
    if weight.dtype not in DTYPES:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}, expected float32, bfloat16 or float16"
    return "the weight is shared with another module" if owners[id(weight)] > 1 else None


def _nothing_to_pack(model: nn.Module, reasons: Mapping[str, int]) -> str:
    if not reasons:
        hint = "; SparseLinear.from_linear packs one layer" if _is_linear(model) else ""
        return f"model: expected linear layers, got a {type(model).__name__} without any{hint}"
    counted = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    return f"model: none of its {sum(reasons.values())} linear layers can be packed ({counted})"


def _places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, Places]:
    """Return the places of the wanted modules by the first name of each."""
    found: dict[int, tuple[str, Places]] = {}
    for parent_name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module is not None and wanted(module):
                name = f"{parent_name}.{child}" if parent_name else child
                found.setdefault(id(module), (name, []))[1].append((parent, child))
    return dict(found.values())


def _at(places: Places) -> nn.Module:
    parent, child = places[0]
    return parent.get_submodule(child)


def _put(places: Places, module: nn.Module) -> None:
    for parent, child in places:
        parent._modules[child] = module


def _is_packed_so(module: nn.Module, format: str) -> bool:
    return isinstance(module, SparseLinear) and format in (PACKED, module.format)


def _dense_weight(module: nn.Module) -> torch.Tensor:
    return module.dense_weight() if isinstance(module, SparseLinear) else linear_weight(module)


def _share_of_zeros(found: Mapping[str, Places]) -> float:
    zeros = total = 0
    for places in found.values():
        weight = _dense_weight(_at(places))
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / max(1, total)


def _packed(name: str, linear: nn.Module, format: str | None) -> nn.Module:
    """Return the layer in `format`, repacked if necessary; None is dense."""
    if isinstance(linear, SparseLinear):
        linear = linear.to_linear()
    if format is None:
        return linear
    try:
        return SparseLinear.from_linear(linear, format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_module(model: nn.Module) -> None:
    """Raise `TypeError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")


def _check_no_hooks(name: str, linear: nn.Module, change: str) -> None:
    """Raise `ValueError` for a layer with hooks. accelerate's are hidden in a forward of the instance."""
    if any(getattr(linear, hooks) for hooks in HOOKS) or "forward" in vars(linear):
        hint = ", or leave it out with exclude" if change == "packing" else ""
        raise ValueError(f"{name}: expected no hooks, since {change} would lose them; remove them first{hint}")


def _check_not_offloaded(name: str, linear: nn.Module) -> None:
    if (linear.device.type if isinstance(linear, SparseLinear) else linear.weight.device.type) == "meta":
        raise ValueError(f"{name}: expected a weight in memory, got an offloaded one, which is not supported")


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
