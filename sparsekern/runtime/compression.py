"""`compress`: second copies of 2:4 weights for cuSPARSELt, added to a packed model and dropped from it."""

from __future__ import annotations

from torch import nn

from .packing import check_module
from .sparse_linear import SparseLinear


def compress(model: nn.Module) -> nn.Module:
    """Add a compressed copy for cuSPARSELt to each 2:4 weight of a packed model on a CUDA device, in place.

    Prompts and large batches are then multiplied on the sparse tensor cores without unpacking. The copies take as much memory as the
    packed weights. Layers that cuSPARSELt cannot hold are skipped; `SparseLinear.supports_compressed` gives the reason. The speed has
    not been measured; see `SparseLinear.compress`.

    Args:
        model: a packed model.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no packed layer, cuSPARSELt can hold none of them, or a weight has a NaN.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "2:4", progress=False)
        >>> sparsekern.runtime.compress(sparsekern.pack(model))  # here on a CPU
        Traceback (most recent call last):
        ...
        ValueError: model: cuSPARSELt can hold none of its 21 packed layers; ...
    """
    layers = _packed_layers(model)
    support = {name: layer.supports_compressed() for name, layer in layers.items()}
    if not any(found.ok for found in support.values()):
        name, found = next(iter(support.items()))
        raise ValueError(
            f"model: cuSPARSELt can hold none of its {len(layers)} packed layers; {name or 'the model'}: {found.reason}"
        )
    for name, layer in layers.items():
        if support[name].ok:
            try:
                layer.compress()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return model


def drop_compressed(model: nn.Module) -> nn.Module:
    """Free the compressed copies that `compress` added to a packed model, in place.

    Args:
        model: a packed model, with or without such copies.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no packed layers.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "2:4", progress=False)
        >>> packed = sparsekern.runtime.drop_compressed(sparsekern.pack(model))
    """
    for layer in _packed_layers(model).values():
        layer.drop_compressed()
    return model


def _packed_layers(model: nn.Module) -> dict[str, SparseLinear]:
    check_module(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not layers:
        raise ValueError(f"model: expected packed layers, got a {type(model).__name__} without any; sparsekern.pack makes them")
    return layers
