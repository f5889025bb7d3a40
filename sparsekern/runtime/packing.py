"""`pack` and `unpack`: a model's linear layers as `SparseLinear` where that makes them smaller, and back."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from types import ModuleType

import torch
from torch import nn

from ..models.globs import Globs, as_globs, check_matches, matches
from ..models.linears import is_conv1d, linear_weight
from .formats import format_of
from .sparse_linear import DTYPES, SparseLinear

AUTO = "auto"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def pack(model: nn.Module, format: str = AUTO, *, include: Globs = None, exclude: Globs = None) -> nn.Module:
    """Put a `SparseLinear` in the place of each linear layer that gets smaller by it.

    A layer whose weight is shared with another module, such as an `lm_head` tied to the embeddings, stays as it is, and so do layers
    of other dtypes than float32, bfloat16 and float16, subclasses of `nn.Linear`, and what is packed already.

    Args:
        model: a pruned model, or any module with pruned linears; changed in place, one layer at a time.
        format: `"auto"` takes the smallest format that each weight fits; `"bitmask"` or `"N:M"` considers only that one.
        include: names or globs of linears to pack, such as `"*.mlp.*"`; all of them where it is None.
        exclude: names or globs of linears to leave as they are.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown format; a glob that matches nothing; a layer with hooks, which would be lost; a model that another
            program has quantised; nothing that would get smaller.
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if format != AUTO:
        format_of(format)
    transformers_side = _transformers_side(model)
    if transformers_side:
        transformers_side.check_unmarked(model)
    places = _linears(model, include, exclude)
    chosen = {name: smallest(linear_weight(_at(places[name])), format) for name in places}
    for name, best in chosen.items():
        if best is not None:
            _check_no_hooks(name, _at(places[name]))
    for name, best in chosen.items():
        if best is not None:
            _put(places[name], _packed(name, _at(places[name]), best))
    if not is_packed(model):
        raise ValueError(f"model: none of its {len(places)} linear layers gets smaller with format={format!r}; is it pruned?")
    if transformers_side:
        transformers_side.mark(model)
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Put a dense layer in the place of each `SparseLinear`, in place, and return `model`. A model with none is left as it is."""
    for places in _places(model, lambda module: isinstance(module, SparseLinear)).values():
        _put(places, _at(places).to_linear())
    if transformers_side := _transformers_side(model):
        transformers_side.unmark(model)
    return model


def packed_copy(model: nn.Module, format: str = AUTO) -> nn.Module:
    """A packed model beside the dense one; what is not packed is shared with it."""
    return pack(_sharing_copy(model), format)


def unpacked_copy(model: nn.Module) -> nn.Module:
    """A dense model beside the packed one; what is not packed is shared with it."""
    return unpack(_sharing_copy(model))


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, SparseLinear) for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """What a model's parameters and buffers occupy in memory; shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in chain(model.parameters(), model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """The zeros among all weights of a model, packed ones included, and how many weights there are."""
    zeros = total = 0
    for tensor in model.parameters():  # of a packed weight, the values that are stored
        total += tensor.numel()
        zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            left_out = layer.out_features * layer.in_features - sum(t.numel() for t in layer.tensors.values() if t.is_floating_point())
            total, zeros = total + left_out, zeros + left_out
    return zeros, total


def smallest(weight: torch.Tensor, format: str = AUTO) -> str | None:
    """The format that `weight` fits with the fewest bytes, of all there are or of one; None where dense has no more."""
    best, fewest = None, weight.numel() * weight.element_size()
    for name in _fitting(weight) if format == AUTO else [format]:
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


Places = list[tuple[nn.Module, str]]  # where one module hangs: its parents, and its name in each


def _linears(model: nn.Module, include: Globs, exclude: Globs) -> dict[str, Places]:
    include, exclude = as_globs("include", include), as_globs("exclude", exclude)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())

    def packable(module: nn.Module) -> bool:
        if type(module) is not nn.Linear and not is_conv1d(module):
            return False
        return module.weight.dtype in DTYPES and owners[id(module.weight)] == 1

    found = _places(model, packable)
    if not found:
        return found
    check_matches("include", include, list(found))
    check_matches("exclude", exclude, list(found))
    return {
        name: places for name, places in found.items() if (include is None or matches(name, include)) and not matches(name, exclude)
    }


def _places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, Places]:
    """The modules that are wanted, by the first of their names."""
    found: dict[int, tuple[str, Places]] = {}
    for parent_name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module is not None and wanted(module):
                name = f"{parent_name}.{child}" if parent_name else child
                found.setdefault(id(module), (name, []))[1].append((parent, child))
    return dict(found.values())


def _at(places: Places) -> nn.Module:
    parent, child = places[0]
    return parent._modules[child]


def _put(places: Places, module: nn.Module) -> None:
    for parent, child in places:
        parent._modules[child] = module


def _packed(name: str, linear: nn.Module, format: str) -> SparseLinear:
    try:
        return SparseLinear.from_linear(linear, format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_no_hooks(name: str, linear: nn.Module) -> None:
    if any(getattr(linear, hooks) for hooks in HOOKS):
        raise ValueError(f"{name}: has hooks, which packing would lose; remove them first, or leave it out with exclude")


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A model of its own modules that shares every parameter and buffer."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _transformers_side(model: nn.Module) -> ModuleType | None:
    """What tells transformers that a model of its is packed; None for other modules."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    from . import quantizer

    return quantizer
