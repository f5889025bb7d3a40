"""Find the heads and neurons of a decoder's blocks: slices of several linears that are only useful together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .experts import ExpertLinear
from .linears import Linear

HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")  # attributes of an attention that hold the channels of a head


@dataclass(frozen=True, eq=False)
class Units:
    """The heads of one attention or the neurons of one feed-forward network.

    Attributes:
        kind: `"heads"` or `"neurons"`.
        consumer: the output projection, which reads `size` columns from each unit.
        producers: linears with one slice of `size` rows a unit.
        shared: linears with fewer slices, each used by several units (grouped keys and values).
        size: channels of a unit.
    """

    kind: str
    consumer: Linear
    producers: tuple[Linear, ...]
    shared: tuple[Linear, ...]
    size: int

    @property
    def count(self) -> int:
        """Number of units."""
        return self.consumer.features // self.size

    def groups(self, linear: Linear) -> int:
        """Return how many slices of rows a linear of `shared` has."""
        return len(linear.weight) // self.size

    def square_norms(self) -> torch.Tensor:
        """Return the squared norm of each unit's weights, `[count]` float64; a shared slice is divided among its units."""
        total = _squares(self.consumer.weight, 0).view(self.count, self.size).sum(1)
        for linear in self.producers:
            total += _squares(linear.weight, 1).view(self.count, self.size).sum(1)
        for linear in self.shared:
            users = self.count // self.groups(linear)
            total += _squares(linear.weight, 1).view(-1, self.size).sum(1).repeat_interleave(users) / users
        return total


def find_units(model: nn.Module, linears: Sequence[Linear]) -> list[Units]:
    """Return the heads and neurons of one block.

    Linears of one parent module belong together, and one of them consumes what the others produce: an attention (its module knows
    the size of a head) or a feed-forward network. A fused producer is left out, since the layout of its rows is unknown; its units
    are still cut off from the consumer. Modules without this shape (routers, state-space mixers) have no units.

    Args:
        model: the model that holds the block.
        linears: all linears of the block; with some of them missing, another could pass for the consumer.

    Raises:
        ValueError: the output projection of an attention is outside its module.
    """
    owners: dict[str, list[Linear]] = {}
    for linear in linears:
        owners.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    return list(_units(model, owners))


def _units(model: nn.Module, owners: dict[str, list[Linear]]) -> Iterator[Units]:
    for name, linears in owners.items():
        own = linears[0].modules[0]
        attention = own.experts.module if isinstance(own, ExpertLinear) else model.get_submodule(name)
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
    """Return the last linear whose outputs have the width of all the other linears' inputs."""
    fitting = [
        linear for linear in linears if all(other.features == len(linear.weight) for other in linears if other is not linear)
    ]
    return fitting[-1] if len(linears) > 1 and fitting else None


def _is_shared(linear: Linear, features: int, size: int) -> bool:
    rows = len(linear.weight)
    return rows < features and rows % size == 0 and features % rows == 0


def _squares(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64).square()
