"""The heads and neurons of a decoder's blocks: slices of several linears that mean nothing without each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .linears import Linear

HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")  # under which an attention knows the channels of a head


@dataclass(frozen=True, eq=False)
class Units:
    """`count` heads or neurons of one attention or FFN: the inputs of `consumer` that they feed, `size` columns each.

    `producers` have the same slices as rows. `shared` have fewer, each used by several units in turn (grouped keys and values).
    """

    kind: str  # "heads" or "neurons"
    consumer: Linear
    producers: tuple[Linear, ...]
    shared: tuple[Linear, ...]
    size: int

    @property
    def count(self) -> int:
        return self.consumer.features // self.size

    def groups(self, linear: Linear) -> int:
        """How many slices of rows a linear of `shared` has."""
        return len(linear.weight) // self.size

    def square_norms(self) -> torch.Tensor:
        """`[count]` float64: of all weights of a unit; what several units share counts in parts."""
        total = _squares(self.consumer.weight, 0).view(self.count, self.size).sum(1)
        for linear in self.producers:
            total += _squares(linear.weight, 1).view(self.count, self.size).sum(1)
        for linear in self.shared:
            users = self.count // self.groups(linear)
            total += _squares(linear.weight, 1).view(-1, self.size).sum(1).repeat_interleave(users) / users
        return total


def find_units(model: nn.Module, linears: Sequence[Linear]) -> list[Units]:
    """The heads and neurons of one block, whose linears must be given whole: of some of them, another may pass for the consumer.

    Linears of one parent module belong together, and one of them consumes what the others produce: an attention (its module knows
    the size of a head) or an FFN. A producer that is fused with others is left out, since how its rows are laid out cannot be seen:
    its units are still cut off from the consumer. Where no such shape is found (routers, state-space mixers) there are no units.

    Raises:
        ValueError: an attention whose output projection is not in its module, so that query, key or value would pass for it.
    """
    owners: dict[str, list[Linear]] = {}
    for linear in linears:
        owners.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    return list(_units(model, owners))


def _units(model: nn.Module, owners: dict[str, list[Linear]]) -> Iterator[Units]:
    for name, linears in owners.items():
        attention = model.get_submodule(name)
        size = next((size for attribute in HEAD_SIZES if isinstance(size := getattr(attention, attribute, None), int)), 1)
        consumer = _consumer(linears)
        if consumer is None or consumer.features % size:
            continue
        others = [linear for linear in linears if linear is not consumer]
        if size > 1 and len(others) < 3 and all(len(linear.weight) <= consumer.features for linear in others):
            found = ", ".join(f"{linear.name.rpartition('.')[2]} {linear.features} to {len(linear.weight)}" for linear in linears)
            raise ValueError(
                f"model: expected query, key, value and output projection in {name} of {type(model).__name__}, got {found}"
            )
        whole = tuple(linear for linear in others if len(linear.weight) == consumer.features)
        shared = tuple(linear for linear in others if size > 1 and _is_shared(linear, consumer.features, size))
        yield Units("heads" if size > 1 else "neurons", consumer, whole, shared, size)


def _consumer(linears: Sequence[Linear]) -> Linear | None:
    """The last linear that leads back to where all the others start from."""
    fitting = [
        linear for linear in linears if all(other.features == len(linear.weight) for other in linears if other is not linear)
    ]
    return fitting[-1] if len(linears) > 1 and fitting else None


def _is_shared(linear: Linear, features: int, size: int) -> bool:
    rows = len(linear.weight)
    return rows < features and rows % size == 0 and features % rows == 0


def _squares(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64).square()
