"""The head of a model in 8 bits: where it is, what refuses it, and the tie to its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.linears import is_plain_linear
from .formats import INT8
from .int8_embedding import Int8Embedding, TiedHead
from .packable import Places, is_hooked
from .packed_weight import DTYPES
from .sparse_linear import SparseLinear

HEADS = (INT8,)
ARGUMENT = "head"
TIES = "_tied_weights_keys"  # of a class of transformers


@dataclass(frozen=True)
class Head:
    """A head that can be packed.

    Attributes:
        name: name of its module.
        linear: the head, dense or packed.
        places: parents of the head, and its name in each.
        embedding: the embeddings that share its weight, or None.
        embedding_name: name of their module, empty without any.
        embedding_places: parents of the embeddings, and their name in each.
    """

    name: str
    linear: nn.Module
    places: Places
    embedding: nn.Embedding | None
    embedding_name: str
    embedding_places: Places

    def check_no_hooks(self) -> None:
        """Raise `ValueError` if packing would lose hooks."""
        for name, module in ((self.name, self.linear), (self.embedding_name, self.embedding)):
            if module is not None:
                _check_no_hooks(name, module, "packing")

    def put(self, model: nn.Module) -> None:
        """Pack the head, and the embeddings that it is tied to.

        Raises:
            ValueError: a value is not finite.
        """
        if self.embedding is None:
            dense = self.linear.to_linear() if isinstance(self.linear, SparseLinear) else self.linear
            try:
                _put(self.places, SparseLinear.from_linear(dense, INT8))
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
            return
        try:
            packed = Int8Embedding.from_embedding(self.embedding)
        except ValueError as error:
            raise ValueError(f"{self.embedding_name}: {error}") from error
        tie(model, self.name, packed, self.embedding_places)


def check_head(head: str | None) -> None:
    """Raise `ValueError` unless a head can be packed so."""
    if head is not None and head not in HEADS:
        raise ValueError(f"{ARGUMENT}: expected 'int8' or None, got {head!r}")


def find_head(model: nn.Module) -> Head | None:
    """Return the head of a model; None if it has 8 bits already.

    Raises:
        ValueError: the model has no head, one that does more than multiply, or one that shares its bias, or its weight
            with more than embeddings.
    """
    get = getattr(model, "get_output_embeddings", None)
    linear = get() if get is not None else None
    if linear is None:
        raise ValueError(
            f"{ARGUMENT}: expected a model with a head, which makes logits of hidden states, got {type(model).__name__}"
        )
    places = _places(model, linear)
    name = _name_of(model, linear)
    if isinstance(linear, SparseLinear):
        return None if linear.format == INT8 else Head(name, linear, places, None, "", [])
    if not is_plain_linear(linear) or not isinstance(linear, nn.Linear):
        raise ValueError(f"{ARGUMENT}: expected a plain linear, got {name}, a {type(linear).__name__}")
    weight = linear.weight
    if weight.device.type == "meta":
        raise ValueError(f"{ARGUMENT}: expected a weight in memory, got an offloaded one ({name}), which is not supported")
    if weight.dtype not in DTYPES:
        found = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{ARGUMENT}: expected float32, bfloat16 or float16, got {found} ({name})")
    for own, module in model.named_modules():
        if linear.bias is not None and module is not linear and _shares(module, linear.bias):
            raise ValueError(
                f"{ARGUMENT}: expected a bias that is not shared, got that of {name}, which {own or 'the model'} shares"
            )
    others = [(own, module) for own, module in model.named_modules() if module is not linear and _shares(module, weight)]
    if not others:
        return Head(name, linear, places, None, "", [])
    own, module = others[0]
    if type(module) is not nn.Embedding or module.max_norm is not None:
        raise ValueError(
            f"{ARGUMENT}: expected to be tied to plain embeddings, got {name}, which is tied to {own}, a {type(module).__name__}"
        )
    shared = _places(model, module)
    if len(others) > 1 or len(shared) > 1:
        raise ValueError(
            f"{ARGUMENT}: expected to be tied to embeddings in one place, got {name}, which is tied to those in several"
        )
    return Head(name, linear, places, module, own, shared)


def tie(model: Any, name: str, packed: Int8Embedding, places: Places) -> None:
    """Put packed embeddings in their place, and a head that is tied to them in that of the linear of this name."""
    _put(places, packed)
    linear = model.get_submodule(name)
    _put(_places(model, linear), TiedHead(packed, linear.bias).train(linear.training))
    # transformers knows ties of parameters only.
    key, declared = f"{name}.weight", getattr(model, TIES, None)
    getattr(model, "all_tied_weights_keys", {}).pop(key, None)
    if isinstance(declared, dict):
        setattr(model, TIES, {target: source for target, source in declared.items() if target != key})


def check_ties(model: nn.Module) -> None:
    """Raise `ValueError` if `untie` would lose hooks."""
    for name, module in model.named_modules():
        if isinstance(module, (Int8Embedding, TiedHead)):
            _check_no_hooks(name, module, "unpacking")


def untie(model: Any) -> None:
    """Make packed embeddings dense, and the heads that are tied to them, which share the dense weight."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, (Int8Embedding, TiedHead))}
    for packed in [module for module in names if isinstance(module, Int8Embedding)]:
        dense = packed.to_embedding()
        _put(_places(model, packed), dense)
        for head in [module for module in names if isinstance(module, TiedHead) and module.embeddings is packed]:
            linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
            linear.weight = dense.weight
            linear.register_parameter("bias", head.bias)
            _put(_places(model, head), linear.train(head.training))
            target, source = f"{names[head]}.weight", f"{names[packed]}.weight"
            getattr(model, "all_tied_weights_keys", {})[target] = source
            _declare(model, target, source)


def _declare(model: Any, target: str, source: str) -> None:
    """Let the model's own ties, if it has some besides those of its class, hold this one again."""
    declared = vars(model).get(TIES)
    if not isinstance(declared, dict):
        return
    if (whole := {**declared, target: source}) == getattr(type(model), TIES, None):
        delattr(model, TIES)
    else:
        setattr(model, TIES, whole)


def _check_no_hooks(name: str, module: nn.Module, change: str) -> None:
    if is_hooked(module):
        raise ValueError(f"{name}: expected no hooks, since {change} would lose them; remove them first")


def _shares(module: nn.Module, weight: torch.Tensor) -> bool:
    return any(parameter is weight for parameter in module._parameters.values())


def _places(model: nn.Module, module: nn.Module) -> Places:
    def found() -> Iterator[tuple[nn.Module, str]]:
        for parent in model.modules():
            for child, own in parent._modules.items():
                if own is module:
                    yield parent, child

    return list(found())


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, own in model.named_modules() if own is module)


def _put(places: Places, module: nn.Module) -> None:
    for parent, child in places:
        parent._modules[child] = module
