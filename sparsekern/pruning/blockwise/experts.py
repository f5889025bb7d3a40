"""Statistics of fused experts: what a block's experts are called with is recorded once, then a few experts at a time are measured.

An expert sees exactly the tokens that are routed to it, without padding. Its gate and up projections share the statistic of these
tokens. The inputs of its down projection are computed from them while all of its matrices are dense. The recorded calls hold the
hidden states that the block has anyway, so the memory for statistics depends on `expert_bytes`, not on the number of experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...methods.statistics import Gram, Importance, Statistic, inputs_of
from ...models import Linear
from ...models.experts import DOWN, ExpertLinear, Experts, ExpertsCall
from ..batches import TOKENS, Batch
from .shelf import Shelf
from .statistics import BETWEEN_NAMES, SharedStatistics

EXPERT_BYTES = 1 << 30  # of the statistics held at once on a CPU
SHARE_OF_DEVICE = 8  # on a GPU, the statistics take at most one part in so many of its memory


@dataclass(frozen=True)
class RoutedBatch:
    """The rows of one call of fused experts that are routed to one expert; a `Batch` to the statistics, without padding.

    Attributes:
        batch: the batch that the experts were called for.
        hidden: `[rows, hidden]`, the expert's inputs.
        weights: `[rows]`, the routing weights.
        tokens: `[rows]`, the token of each row among `of`.
        of: the number of tokens of the call.
    """

    batch: Batch
    hidden: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    of: int

    def flatten(self, x: torch.Tensor, mask: str | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rows `[n, features]`, none of which is padding."""
        return x, None

    def used(self, rows: int, mask: str | None = None) -> int:
        """Return how many of `rows` belong to real tokens: all."""
        return rows

    def sample_of_row(self, row: int, rows: int, mask: str | None = None) -> int | None:
        """Return the number of the calibration sample of a row, or None where the rows do not follow the samples."""
        return self.batch.sample_of_row(int(self.tokens[row]), self.of)


class RecordedCalls:
    """The calls of the fused experts of one layer, for all batches, sorted by expert.

    Attributes:
        experts: the experts.
        tokens: the number of real tokens that each expert was given.
    """

    def __init__(self, experts: Experts, mask: str | None = TOKENS, shelf: Shelf | None = None) -> None:
        """Prepare to record.

        Args:
            experts: the experts.
            mask: the padding mask that their inputs follow, see `Batch.flatten`.
            shelf: holds the inputs; None keeps them in memory.
        """
        self.experts, self._mask, self._shelf = experts, mask, shelf or Shelf()
        self.tokens = [0] * experts.count
        self._calls: list[tuple[Batch, ExpertsCall, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = []

    def add(self, batch: Batch, call: ExpertsCall) -> None:
        """Add one call.

        Raises:
            ValueError: the batch has padding, and the call does not tell which of its tokens are padding.
        """
        rows = torch.arange(len(call.hidden), device=call.hidden.device)
        try:
            _, real = batch.flatten(call.hidden[: call.tokens], self._mask)
        except ValueError as error:
            raise ValueError(f"{self.experts.name}: {error}") from None
        routed = ((call.index >= 0) & (call.index < self.experts.count)).any(1)
        if real is not None:
            routed &= real[rows % call.tokens]
        hidden = call.hidden
        if not bool(routed.all()):  # keeps only the rows that an expert sees
            rows = rows[routed]
            hidden = hidden[rows]
            call = ExpertsCall(hidden, call.index[rows], call.weights[rows], call.tokens)
        by_expert = call.by_expert(self.experts.count)
        for expert, (own, _) in enumerate(by_expert):
            self.tokens[expert] += len(own)
        key = (self.experts.name, len(self._calls))
        self._shelf.put(key, call.hidden)
        weakref.finalize(self, self._shelf.drop, key)
        call = replace(call, hidden=call.hidden[:0])
        self._calls.append((batch, call, rows % call.tokens, by_expert))

    @property
    def kind(self) -> tuple[str, int] | None:
        """The name of the dtype of the inputs and their width; None while there are none."""
        for _, call, _, _ in self._calls:
            return str(call.hidden.dtype).removeprefix("torch."), call.hidden.shape[1]
        return None

    @property
    def counts(self) -> list[tuple[Batch, int, list[int]]]:
        """For each call its batch, its number of tokens, and the number of rows that each expert was given."""
        return [(batch, call.tokens, [len(rows) for rows, _ in by_expert]) for batch, call, _, by_expert in self._calls]

    def of(self, expert: int) -> Iterator[RoutedBatch]:
        """Yield the inputs of one expert, call by call, without calls that it saw no token in."""
        for number, (batch, call, tokens, by_expert) in enumerate(self._calls):
            rows, weights = by_expert[expert]
            if len(rows):
                yield RoutedBatch(batch, self._shelf.rows((self.experts.name, number), rows), weights, tokens[rows], call.tokens)


class ExpertStatistics:
    """The recorded calls of all fused experts of one block, and the statistics of a few experts at a time.

    Attributes:
        calls: the recorded calls, by the name of the experts of a layer.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        needs: type[Statistic] | None,
        measure_error: bool,
        *,
        routing_weights: bool = False,
        masks: Mapping[str, Sequence[str | None]] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """Prepare to record.

        Args:
            linears: the matrices of experts to gather statistics of.
            needs: the statistic that the method needs; None only where errors are measured.
            measure_error: take Gram matrices in any case, to measure errors.
            routing_weights: scale each token by its routing weight.
            masks: for each module of experts, the padding masks that its inputs follow, see `Batch.flatten`; None is `TOKENS`.
            shelf: holds the inputs of the experts; None keeps them in memory.
        """
        self._needs, self._measure_error, self._routing_weights = needs, measure_error, routing_weights
        masks = masks or {}
        self.calls = {found.name: RecordedCalls(found, masks.get(found.name, (TOKENS,))[0], shelf) for found in experts_in(linears)}
        self._earlier: Mapping[str, torch.Tensor] = {}
        self._linears: dict[tuple[str, int], list[Linear]] = {}
        for linear in linears:
            module = expert_of(linear)
            self._linears.setdefault((module.experts.name, module.expert), []).append(linear)

    def add(self, batch: Batch, calls: Mapping[str, Sequence[ExpertsCall]]) -> None:
        """Add the calls of one batch, by the name of their experts."""
        for name, recorded in self.calls.items():
            for call in calls[name]:
                recorded.add(batch, call)

    def include(self, totals: Mapping[str, torch.Tensor]) -> None:
        """Add the `totals` of earlier datasets to the statistics that are made from now on."""
        self._earlier = totals

    def unseen(self) -> list[Linear]:
        """Return the matrices of the experts that no token was routed to, in this dataset or in those included."""
        earlier = {name for names, total in self._earlier.items() if bool(total.any()) for name in names.split(BETWEEN_NAMES)}
        return [
            linear
            for (name, expert), linears in self._linears.items()
            if not self.calls[name].tokens[expert]
            for linear in linears
            if linear.name not in earlier
        ]

    def groups(self, most_bytes: int) -> Iterator[list[SharedStatistics]]:
        """Yield the statistics of each expert, as many experts of one layer at a time as fit.

        Args:
            most_bytes: bytes of the statistics of one group, which holds at least one expert.
        """
        for chosen in self.by_layer().values():
            size = self.fitting(chosen, most_bytes)
            for start in range(0, len(chosen), size):
                group = []
                for linears in chosen[start : start + size]:
                    module = expert_of(linears[0])
                    group.append(self.gathered(linears, self.calls[module.experts.name].of(module.expert)))
                yield group

    def by_layer(self) -> dict[str, list[list[Linear]]]:
        """Return the matrices of each expert, by the name of the experts of a layer."""
        found: dict[str, list[list[Linear]]] = {}
        for (name, _), linears in self._linears.items():
            found.setdefault(name, []).append(linears)
        return found

    def fitting(self, chosen: Sequence[Sequence[Linear]], most_bytes: int) -> int:
        """Return how many of the experts of a layer are measured at a time, at least one."""
        most = max(bytes_of(linears, self._needs, self._measure_error) for linears in chosen)
        return max(1, most_bytes // max(most, 1))

    def gathered(self, linears: Sequence[Linear], calls: Iterable[RoutedBatch]) -> SharedStatistics:
        """Return the statistics of one expert.

        Args:
            linears: its matrices.
            calls: what it is called with, in the order of the batches.
        """
        shared = SharedStatistics(linears, self._needs, self._measure_error)
        module = expert_of(linears[0])
        by_part = {expert_of(linear).part: linear.name for linear in linears}
        for routed in calls:
            inputs = {name: [routed.hidden] for part, name in by_part.items() if part != DOWN}
            if DOWN in by_part:
                inputs[by_part[DOWN]] = [module.experts.down_inputs(module.expert, routed.hidden)]
            if self._routing_weights:
                scaled: dict[int, torch.Tensor] = {}
                for x in (x for (x,) in inputs.values()):
                    scaled.setdefault(id(x), x.float() * routed.weights[:, None].float())
                inputs = {name: [scaled[id(x)]] for name, (x,) in inputs.items()}
            shared.add(routed, inputs)
        if self._earlier:
            shared.include(self._earlier)
        return shared


def expert_of(linear: Linear) -> ExpertLinear:
    """Return the module of an expert's matrix."""
    module = linear.modules[0]
    assert isinstance(module, ExpertLinear)
    return module


def is_expert(linear: Linear) -> bool:
    """Return whether a linear is a matrix of a fused expert."""
    return isinstance(linear.modules[0], ExpertLinear)


def parted(linears: Sequence[Linear]) -> tuple[list[Linear], list[Linear]]:
    """Return the linears with modules of their own, and the matrices of fused experts."""
    return [linear for linear in linears if not is_expert(linear)], [linear for linear in linears if is_expert(linear)]


def experts_in(linears: Sequence[Linear]) -> list[Experts]:
    """Return the fused experts that some of `linears` are matrices of, in their order."""
    return list({expert_of(linear).experts.name: expert_of(linear).experts for linear in linears if is_expert(linear)}.values())


def expert_bytes(device: torch.device, limit: int | None = None) -> int:
    """Return how many bytes the statistics of experts may take at once, `limit` at most on a CPU.

    On a CPU, results do not depend on it. A GPU may factor a batch of another size with other rounding, so the number depends on the
    device alone and not on what is free, and a resumed run makes the same batches.
    """
    if device.type != "cuda":
        return EXPERT_BYTES if limit is None else min(EXPERT_BYTES, limit)
    return torch.cuda.get_device_properties(device).total_memory // SHARE_OF_DEVICE


def bytes_of(linears: Sequence[Linear], needs: type[Statistic] | None, measure_error: bool) -> int:
    """Return the bytes of the statistics of one expert: those of its inputs with their factors, and importances."""
    by_features = {linear.features for linear in linears}
    gram = measure_error or needs is None or inputs_of(needs) is Gram
    total = sum(2 * 4 * features**2 if gram else 4 * features for features in by_features)
    if needs is not None and issubclass(needs, Importance):
        total += sum(4 * linear.weight.numel() for linear in linears)
    return total
