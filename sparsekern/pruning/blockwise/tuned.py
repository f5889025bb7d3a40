"""Tuning behind the method: what the block loop gives to `tune_block`, and what it keeps of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from ..._warnings import SparsekernWarning
from ...methods import BlockTuning, FourBits
from ...models import Blocks, Linear
from ...models.streaming import stream_of
from ..batches import Batch
from ..plan import Plan
from ..run import BlockResult, RunContext
from ..seeds import derived_seed
from ..tuning.block import Samples, trained_of, tune_block
from ..tuning.together import Together
from ..tuning.trainable import check_trainable
from .activations import Activations
from .course import Course
from .dense_stream import DenseStream
from .shares import Share
from .written import write


class BlockTuner:
    """Tunes each block once it is solved."""

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

    def tune(self, index: int, linears: Sequence[Linear], result: BlockResult) -> BlockResult:
        """Write the result of block `index` to the model, tune the block, and return its result with what tuning changed.

        After an error a block of a model in memory is dense again; that of a streamed one is read again.
        """
        clock = self._context.clock
        block, name = self._course.blocks.modules[index], self._course.blocks.block_name(index)
        with clock.phase("forward"):
            self._dense.advance(index)  # with the weights from before
        streamed = stream_of(self._context.model) is not None
        others = other_parameters(block, name, linears)
        before = {} if streamed else {name: tensor.clone() for name, tensor in others.items()}
        dense = {} if streamed else {linear.name: linear.weight.clone() for linear in linears}
        start = clock.now()
        with clock.phase("tune"):
            try:
                write(linears, result.weights)
                trained = trained_of(block, linears, name, on_grid=isinstance(self._context.method, FourBits))
                seed = derived_seed(self._context.seed, f"tune {name}")
                found = tune_block(block, trained, self._samples(index), self._settings, seed)
            except BaseException:
                if not streamed:
                    write(linears, dense)
                    _copy(others, before)
                raise
        if found.failure:
            warnings.warn(
                f"{name}: {found.failure}, so it keeps the weights of the method; lower BlockTuning.learning_rate",
                SparsekernWarning,
                stacklevel=2,
            )
        row = {"block": index, "before": found.before, "after": found.after, "steps": found.steps, "seconds": clock.now() - start}
        if streamed:  # whose blocks are kept as they are
            return replace(result, weights={linear.name: linear.weight for linear in linears}, tuning=row)
        weights = {linear.name: linear.weight.clone() for linear in linears}
        return replace(result, weights=weights, others={name: own.clone() for name, own in others.items()}, tuning=row)

    def _samples(self, index: int) -> Samples:
        activations, dense = self._activations, self._dense.activations
        mask = self._course.run_of(index).mask

        def run(number: int) -> torch.Tensor:
            return cast("torch.Tensor", activations.run(number, index))

        return Samples(
            run=run,
            target=dense.hidden,
            tokens=partial(_tokens, activations, mask),
            fitted=self._by_leaf(index, held_out=False),
            held_out=self._by_leaf(index, held_out=True),
            together=Together(self._context.world, self._context.leaves),
        )

    def _by_leaf(self, index: int, *, held_out: bool) -> list[list[int]]:
        """Return the batches that run block `index`, either those held out or the others, for each leaf of this rank."""
        found: list[list[int]] = [[] for _ in self._share.leaves]
        for number, batch in enumerate(self._activations.batches):
            if batch.held_out == held_out and self._activations.runs(number, index):
                found[self._share.leaf_of(batch) - self._share.leaves[0]].append(number)
        return found


def _tokens(activations: Activations, mask: str | None, number: int) -> torch.Tensor | None:
    return activations.batches[number].mask(mask)


def _copy(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def check_trained(model: nn.Module, plan: Plan, batches: list[Batch]) -> None:
    """Raise unless the model can be trained as a plan says.

    Args:
        model: the model.
        plan: what follows the method.
        batches: the calibration data.

    Raises:
        ValueError: blocks are tuned that take more than the output of the one before, or a model is distilled that predicts no next
            tokens.
    """
    if plan.distill is not None:
        check_trainable(model, batches, "Distill")
    if plan.tune is not None and (plan.course is None or not plan.course.chain):
        raise ValueError(
            f"tune: expected a model whose blocks take nothing but the output of the one before, got {type(model).__name__}"
        )


def other_parameters(block: nn.Module, name: str, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
    """Return the parameters of a block that tuning changes besides its linears, by name."""
    parameters = {linear.parameter for linear in linears}
    return {of.name: of.parameter.detach() for of in trained_of(block, (), name) if of.parameter not in parameters}


def restore_others(blocks: Blocks, index: int, linears: Sequence[Linear], others: Mapping[str, torch.Tensor]) -> None:
    """Write what tuning had changed of block `index` besides its linears.

    Raises:
        ValueError: it is not of this block.
    """
    own = other_parameters(blocks.modules[index], blocks.block_name(index), linears)
    for name in own.keys() | others.keys():
        found = others.get(name)
        if name not in own or found is None or found.shape != own[name].shape or found.dtype != own[name].dtype:
            raise ValueError(f"out: block {index} of the checkpoint is damaged: {name} is missing, or not of this model")
    _copy(own, others)
