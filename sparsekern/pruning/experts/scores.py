"""Sums over the tokens of each expert, gathered while the blocks of a dense model run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ...methods import ExpertSums
from ...models.experts import Experts, ExpertsCall
from ...models.listed_experts import ListedExperts
from ...ranks import TreeSum
from ...ranks.sums import add_over_ranks
from ..batches import Batch
from ..blockwise.shares import Share
from .listed_calls import ListedCall


class ExpertScores:
    """Sums of the experts of one block. `visit` adds one call of them, batch after batch."""

    def __init__(
        self, found: Iterable[Experts | ListedExperts], share: Share, batches: Sequence[Batch], masks: Mapping[str, str | None]
    ) -> None:
        """Make empty sums.

        Args:
            found: the experts of the block.
            share: the batches of this rank, and their leaves.
            batches: those of them that run the block, in order.
            masks: the name of the padding mask that the tokens of the experts follow, by the name of the experts.
        """
        self.batches, self._share, self._masks = batches, share, masks
        self._sums = {
            experts.name: {leaf: ExpertSums.zeros(experts.count, experts.device) for leaf in share.leaves} for experts in found
        }
        self._calls = dict.fromkeys(self._sums, 0)

    def visit(self, experts: Experts | ListedExperts, call: ExpertsCall | ListedCall) -> None:
        """Add a call of `experts`, whose tokens are those of the next batch; padding is left out.

        Raises:
            ValueError: the experts are called more than once for a batch, or on other tokens than the batch's; or an output is NaN
                or infinite.
        """
        number = self._calls[experts.name]
        if number == len(self.batches):
            raise ValueError(f"model: {experts.name} is called more than once in a forward, which scores of experts cannot follow")
        self._calls[experts.name] += 1
        batch = self.batches[number]
        mask = batch.mask(self._masks[experts.name])
        if mask is not None and mask.numel() != call.tokens:
            raise ValueError(
                f"{experts.name}: called with {call.tokens} tokens for a padded batch of {mask.numel()}, which does not tell which are "
                "padding; calibrate with samples of one length"
            )
        sums = self._sums[experts.name][self._share.leaf_of(batch)]
        for expert, (rows, weights) in enumerate(call.by_expert(experts.count)):
            real = rows >= 0 if mask is None else mask.flatten()[rows % call.tokens]
            if real.any():
                rows, weights, outputs = rows[real], weights[real], _outputs(experts, call, expert, rows, real)
                sums.add(expert, outputs, weights)
                if not torch.isfinite(sums.squares[expert]):
                    raise _not_finite(experts, expert, outputs, rows % call.tokens, call.tokens, batch)

    def check_complete(self) -> None:
        """Raise `ValueError` unless every batch has called all experts."""
        for name, calls in self._calls.items():
            if calls != len(self.batches):
                raise ValueError(f"model: {name} was called for {calls} of {len(self.batches)} batches, expected once for each")

    def result(self) -> dict[str, ExpertSums]:
        """Return the sums over the batches of all ranks, by the name of the experts. All ranks call this."""
        self._share.world.agree("scores")
        found = {}
        for name, by_leaf in self._sums.items():
            tree: TreeSum[ExpertSums] = TreeSum(ExpertSums.plus)
            for sums in by_leaf.values():
                tree.put(sums)
            found[name] = tree.result()
            for tensor in vars(found[name]).values():
                add_over_ranks(self._share.world, tensor)
        return found


def _outputs(
    experts: Experts | ListedExperts, call: ExpertsCall | ListedCall, expert: int, rows: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Return the outputs of an expert for those of the rows that are routed to it that are real."""
    if isinstance(call, ListedCall):
        return call.outputs[expert][real]
    assert isinstance(experts, Experts)
    return experts.output(expert, call.hidden[rows[real]])


def _not_finite(
    experts: Experts | ListedExperts, expert: int, outputs: torch.Tensor, tokens: torch.Tensor, count: int, batch: Batch
) -> ValueError:
    """Return the error for NaN or Inf in an expert's output, or in the square of its norm."""
    bad = (~torch.isfinite(outputs.double().square().sum(1))).nonzero()
    sample = batch.sample_of_row(int(tokens[bad[0, 0]]), count) if len(bad) else None
    where = "an unknown calibration sample" if sample is None else f"calibration sample {sample}"
    return ValueError(
        f"{experts.name}.{expert}: its output is not finite in {where}; leave that sample out, or run the model in float32 or bfloat16 "
        "if float16 overflowed"
    )
