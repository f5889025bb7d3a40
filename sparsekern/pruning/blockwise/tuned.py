"""Tuning behind the method: what the block loop gives to `tune_block`, and what it keeps of it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..._warnings import SparsekernWarning
from ...methods import BlockTuning, FourBits
from ...models import Linear
from ...models.streaming import stream_of
from ...training.masked_adamw import Trained
from ..batches import Batch
from ..plan import Plan
from ..run import BlockResult, RunContext
from ..seeds import derived_seed
from ..tuning.block import Samples, trained_of, tune_block
from ..tuning.together import Together
from ..tuning.trainable import check_trainable, why_not_causal
from .activations import Activations
from .course import Course
from .dense_stream import DenseStream
from .shares import Share
from .written import write

BEFORE = "in front of the block before"  # keys of the hidden states that two blocks are tuned on


class BlockTuner:
    """Tunes each block once it is solved, alone or together with the one in front of it."""

    def __init__(
        self,
        context: RunContext,
        settings: BlockTuning,
        share: Share,
        activations: Activations,
        course: Course,
        dense: DenseStream,
    ) -> None:
        """Prepare a run.

        Args:
            context: the run.
            settings: see `BlockTuning`.
            share: the batches of this rank.
            activations: the hidden states of the pruned model.
            course: the course of the forwards.
            dense: the hidden states of the dense model.
        """
        self._context, self._settings, self._share = context, settings, share
        self._activations, self._course, self._dense = activations, course, dense

    @contextmanager
    def tuned(self, index: int, linears: Sequence[Linear], result: BlockResult) -> Iterator[BlockResult]:
        """Write the result of block `index` to the model, tune the block, and yield its result with what tuning changed.

        After an error here or within, a block of a model in memory is dense again, and its partner what it was. A streamed block is read
        again.
        """
        with self._context.clock.phase("forward"):
            self._dense.advance(index, self._context.world.check)  # with the weights from before
        streamed = stream_of(self._context.model) is not None
        others = other_parameters(self._context.plan, index, linears)
        before = {} if streamed else {name: tensor.clone() for name, tensor in others.items()}
        dense = {} if streamed else {linear.name: linear.weight.clone() for linear in linears}
        try:
            row = self._tune(index, linears, result)
            if streamed:  # whose blocks are kept as they are
                found = replace(result, weights={linear.name: linear.weight for linear in linears}, tuning=row)
            else:
                weights = {linear.name: linear.weight.clone() for linear in linears}
                copies = {name: own.clone() for name, own in others.items()}
                self.settle(index)
                found = replace(result, weights=weights, others=copies, tuning=row)
            yield found
        except BaseException:
            if not streamed:
                write(linears, dense)
                _copy(others, before)
            raise

    def _tune(self, index: int, linears: Sequence[Linear], result: BlockResult) -> dict[str, float]:
        """Write the result of block `index` to the model, tune the block in place, and return its entry in `Report.tuning`."""
        clock, plan, blocks = self._context.clock, self._context.plan, self._course.blocks
        partner = partner_of(plan, index)
        tuned = [index] if partner is None else [partner, index]
        name = blocks.block_name(index)
        start = clock.now()
        with clock.phase("tune"):
            write(linears, result.weights)
            trained = self._trained_of(tuned)
            seed = derived_seed(self._context.seed, f"tune {name}")
            module = nn.ModuleList(blocks.modules[own] for own in tuned)
            found = tune_block(module, trained, self._samples(index, partner), self._settings, seed)
        if found.failure:
            warnings.warn(
                f"{name}: {found.failure}, so it keeps the weights of the method; lower BlockTuning.learning_rate",
                SparsekernWarning,
                stacklevel=4,
            )
        return {"block": index, "before": found.before, "after": found.after, "steps": found.steps, "seconds": clock.now() - start}

    def _trained_of(self, tuned: Sequence[int]) -> list[Trained]:
        blocks, parts, on_grid = self._course.blocks, self._context.plan.parts, isinstance(self._context.method, FourBits)
        return [
            of
            for index in tuned
            for of in trained_of(blocks.modules[index], parts[index], blocks.block_name(index), on_grid=on_grid)
        ]

    def settle(self, index: int) -> None:
        """Bring the hidden states in front of block `index` up to date with its tuned partner, and keep them for the next block."""
        if self._settings.blocks == 1:
            return
        partner, activations = partner_of(self._context.plan, index), self._activations
        with self._context.clock.phase("forward"):
            for number in range(len(activations.batches)):
                self._context.world.check()
                if partner is not None:
                    activations.chain.put(number, self._partner_output(partner, number))
                activations.shelf.put((BEFORE, number), activations.hidden(number))

    def _partner_output(self, partner: int, number: int) -> torch.Tensor:
        before = self._activations.shelf.get((BEFORE, number))
        return self._activations.chain.run_from(number, partner, before)

    def _samples(self, index: int, partner: int | None) -> Samples:
        activations, dense = self._activations, self._dense.activations
        mask = self._course.run_of(index).mask

        def run(number: int) -> torch.Tensor:
            if partner is None:
                return activations.chain.run(number, index)
            return activations.chain.run_from(number, index, self._partner_output(partner, number))

        return Samples(
            run=run,
            target=dense.hidden,
            real=partial(self._real, mask),
            count=partial(self._count, mask),
            fitted=self._by_leaf(index, held_out=False),
            held_out=self._by_leaf(index, held_out=True),
            together=Together(self._context.world, self._context.leaves),
        )

    def _real(self, mask: str | None, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return which rows of hidden states are of real tokens; None if all are."""
        return self._activations.batches[number].flatten(hidden, mask)[1]

    def _count(self, mask: str | None, number: int) -> int:
        """Return the number of rows of a batch that are of real tokens. Its hidden states are not read."""
        shape = self._activations.chain.shape(number)
        if self._real(mask, number, torch.empty(shape, device="meta")) is None:
            return shape[:-1].numel()
        return self._activations.batches[number].used(shape[:-1].numel(), mask)

    def _by_leaf(self, index: int, *, held_out: bool) -> list[list[int]]:
        """Return the batches that run block `index`, either those held out or the others, for each leaf of this rank."""
        found: list[list[int]] = [[] for _ in self._share.leaves]
        for number, batch in enumerate(self._activations.batches):
            if batch.held_out == held_out and self._activations.runs(number, index):
                found[self._share.leaf_of(batch) - self._share.leaves[0]].append(number)
        return found


def partner_of(plan: Plan, index: int) -> int | None:
    """Return the block that is tuned together with block `index`: the one in front of it, if it is pruned and two are tuned at once."""
    if plan.tune is None or plan.tune.blocks == 1:
        return None
    assert plan.course is not None
    place = plan.course.order.index(index)
    before = plan.course.order[place - 1] if place else None
    return None if before is None or not plan.parts[before] else before


def _copy(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def with_trainings(model: nn.Module, plan: Plan, batches: list[Batch], optional: Collection[str] = ()) -> Plan:
    """Return the plan, once it is known that the model can be trained as it says. `optional` trainings that it cannot have are left out.

    Args:
        model: the model.
        plan: what follows the method.
        batches: the calibration data.
        optional: the trainings, by name, that are left out where the model cannot have them, in place of an error.

    Raises:
        ValueError: blocks are tuned that take more than the output of the one before, or a model is distilled that predicts no next
            tokens.
    """
    left_out = []
    if plan.tune is not None and (plan.course is None or not plan.course.chain):
        if "tune" not in optional:
            raise ValueError(
                f"tune: expected a model whose blocks take nothing but the output of the one before, got {type(model).__name__}"
            )
        plan = replace(plan, tune=None)
        left_out.append("tune for a model whose blocks take more than the output of the one before")
    if plan.distill is not None:
        why = why_not_causal(model, batches) if "distill" in optional else None
        if why is None:
            check_trainable(model, batches, "Distill")
        else:
            plan = replace(plan, distill=None)
            left_out.append(f"distill for a model that predicts no next tokens: {why}")
    return replace(plan, left_out=tuple(left_out))


def other_parameters(plan: Plan, index: int, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
    """Return what tuning changes besides the linears of block `index`, by name: its vectors, and what it tunes of its partner."""
    blocks, partner = plan.blocks, partner_of(plan, index)
    parameters = {linear.parameter for linear in linears}
    found = [of for of in trained_of(blocks.modules[index], (), blocks.block_name(index)) if of.parameter not in parameters]
    if partner is not None:
        found += trained_of(blocks.modules[partner], plan.parts[partner], blocks.block_name(partner))
    return {of.name: of.parameter.detach() for of in found}


def restore_others(plan: Plan, index: int, linears: Sequence[Linear], others: Mapping[str, torch.Tensor]) -> None:
    """Write what tuning had changed besides the linears of block `index`.

    Raises:
        ValueError: it is not of this block.
    """
    own = other_parameters(plan, index, linears)
    for name in own.keys() | others.keys():
        found = others.get(name)
        if name not in own or found is None or found.shape != own[name].shape or found.dtype != own[name].dtype:
            raise ValueError(f"out: block {index} of the checkpoint is damaged: {name} is missing, or not of this model")
    _copy(own, others)
