"""Distillation: the whole pruned model is trained towards the dense one, on masks that do not change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import nn

from ..._warnings import SparsekernWarning
from ...methods import Distill, FourBits, LinearMethod
from ...models import Linear
from ...ranks import leaf_sizes
from ...reports import Report
from ...training.divergence import divergence, divergence_of_logits
from ...training.grid import grids_of
from ...training.masked_adamw import MaskedAdamW, Trained, kept_weights
from ..batches import Batch
from ..checkpoint import Checkpoint
from ..gradual.interrupt import interrupt_deferred
from ..gradual.training_state import TrainingState
from ..plan import Plan, Request
from ..run import Blocks, RunContext
from ..seeds import derived_seed
from ..session import batches_for
from ..windows import overlapping, with_held_out
from .checks import training_bytes
from .masters import float32_masters, only_these_require_gradients
from .reader import Reader, frozen_parameters
from .teacher import Teacher
from .together import Together, gradients_of

NAME = "distillation"
MARKS = 5  # evaluations of the held-out samples, besides the one in front
JUDGED = 4096  # tokens of held-out samples that are evaluated; all other samples are trained on


class Distillation:
    """The training of a pruned model towards its teacher.

    Attributes:
        curve: an entry for each evaluation: the `step` in front of which it was made, the `learning_rate` there, and the mean
            divergence `kl` of the held-out tokens.
    """

    def __init__(
        self,
        context: RunContext[Plan, LinearMethod, Report, Blocks],
        settings: Distill,
        checkpoint: Checkpoint | None,
        batches: Sequence[Batch],
    ) -> None:
        """Prepare the training, while the model is dense: it is the teacher.

        Several processes each have the whole model and take every step, on gradients that are summed over the batches of all of them.

        Args:
            context: the run.
            settings: see `Distill`.
            checkpoint: keeps the progress; None keeps none. Of several processes the first has it.
            batches: the samples to train on, of which some are held out.

        Raises:
            MemoryError: what the teacher keeps does not fit.
            OSError: the disk refuses the teacher's hidden states.
        """
        self._context, self._settings, self._progress = context, settings, context.progress
        self._batches, self._model = batches, context.model
        self._together = Together(context.world, context.leaves)
        fitted, held_out = divided(batches, warns=context.world.leads)
        self._fitted, judged = (_by_leaf(numbers, context.leaves) for numbers in (fitted, held_out))
        self._held_out, self._judged_tokens = self._together.own_of(judged), self._tokens(held_out)
        steps = (chain.from_iterable(self._together.own_of(step)) for step in islice(self._steps(), settings.steps))
        used = {*chain.from_iterable(self._held_out), *chain.from_iterable(steps)}
        pruned = [linear.parameter for linear in context.plan.linears]
        with context.clock.phase("distill"):
            on_grid, leaves = isinstance(context.method, FourBits), context.leaves // context.world.size
            training = training_bytes(context.model, on_grid, leaves)
            self._teacher = Teacher(context.model, batches, used, pruned, context.memory.folder, training)
        self._checkpoint = checkpoint
        self.curve: list[dict[str, float]] = []

    def run(self) -> None:
        """Train the pruned model in place. One that is no closer to its teacher on the held-out samples gets its weights back.

        Raises:
            ValueError: a loss or a gradient is not finite. The model has its weights from before then.
            KeyboardInterrupt: Ctrl-C; the step that it fell in is kept in the checkpoint.
        """
        trained = trained_of(self._model, self._context.plan.linears, on_grid=isinstance(self._context.method, FourBits))
        parameters = [of.parameter for of in trained]
        self._student = Reader(self._model, self._batches[0])
        self._state = TrainingState(self._checkpoint, {of.name: of.parameter for of in trained}, NAME)
        first = [parameter.detach().clone() for parameter in parameters]
        settings, finished = self._settings, False
        self._progress.count_steps(settings.steps)
        try:
            with (
                self._context.clock.phase("distill"),
                float32_masters(parameters, mixed_precision=settings.mixed_precision) as (training, judging),
                only_these_require_gradients(self._model, parameters),
                interrupt_deferred() as interrupted,
            ):
                optimizer = MaskedAdamW(trained, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)
                self._train(optimizer, training, judging, interrupted)
            self._evaluate(settings.steps, 0.0, nullcontext())
            finished = self.curve[-1]["kl"] < self.curve[0]["kl"]
            if not finished and self._context.world.leads:
                warnings.warn(
                    f"distillation: the divergence of the held-out samples went from {self.curve[0]['kl']:.4g} to "
                    f"{self.curve[-1]['kl']:.4g}, so the weights from before are kept; lower Distill.learning_rate or use more text",
                    SparsekernWarning,
                    stacklevel=4,
                )
            self._context.report.distillation = self.curve
        finally:
            if not finished:
                for parameter, value in zip(parameters, first, strict=True):
                    parameter.data.copy_(value)

    def _train(
        self, optimizer: MaskedAdamW, training: torch.autocast, judging: torch.autocast, interrupted: Callable[[], bool]
    ) -> None:
        settings, state = self._settings, self._state
        state.load()
        state.restore_masked(optimizer)
        self._share_progress(optimizer)
        self.curve = state.curve
        self._progress.steps_done(state.steps_done)
        every = max(1, math.ceil(settings.steps / MARKS))
        steps = self._steps()
        for step in range(settings.steps):
            leaves = next(steps)
            if step < state.steps_done:
                continue
            lr = settings.learning_rate * _share(step, settings.steps, settings.warmup)
            if step % every == 0:
                self._evaluate(step, lr, judging)
            loss = self._step(optimizer, leaves, lr, training)
            if not math.isfinite(loss):
                raise ValueError(
                    f"Distill.learning_rate: expected a finite loss, got {loss} in step {step + 1} of {settings.steps}; lower it"
                )
            self._progress.step_done(f"divergence {loss:.4f}, held out {self.curve[-1]['kl']:.4f}")
            stopped = any(self._context.world.gather("interrupted", interrupted()))
            state.save_now_and_then(0, step + 1, optimizer.state, now=stopped)
            if stopped:
                raise KeyboardInterrupt
        state.save_now_and_then(0, settings.steps, optimizer.state, now=True)

    def _share_progress(self, optimizer: MaskedAdamW) -> None:
        """Give all processes the progress, weights and moments that the first one has found."""
        world, state = self._context.world, self._state
        state.steps_done, state.curve, optimizer.steps = world.from_first(
            "distillation", (state.steps_done, state.curve, optimizer.steps)
        )
        if state.steps_done:
            for tensor in (*(of.parameter.data for of in optimizer.trained), *optimizer.state().values()):
                sent = tensor.contiguous()
                world.broadcast(sent, 0)
                tensor.copy_(sent)

    def _step(self, optimizer: MaskedAdamW, leaves: Sequence[list[int]], lr: float, autocast: torch.autocast) -> float:
        """Take one step on the mean divergence of all tokens of some batches, and return it; NaN where a gradient is not finite."""
        tokens, own = self._tokens(chain.from_iterable(leaves)), self._together.own_of(leaves)
        if self._together.leaves == 1:
            total = self._backward(own[0], tokens, autocast)
        else:
            parameters = [of.parameter for of in optimizer.trained]
            found = (gradients_of(parameters, partial(self._backward, numbers, tokens, autocast)) for numbers in own)
            *gradients, loss = self._together.total(found)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            total = float(loss)
        return total if math.isfinite(optimizer.step(lr, self._settings.clip)) else math.nan

    def _backward(self, numbers: Iterable[int], tokens: int, autocast: torch.autocast) -> float:
        """Add the gradient of the divergence of some batches, divided by `tokens`, and return it."""
        total = 0.0
        for number in numbers:
            self._context.world.check()
            with torch.enable_grad():
                loss = self._divergence(number, autocast) / tokens
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _evaluate(self, step: int, lr: float, autocast: AbstractContextManager[object]) -> None:
        """Add the mean divergence of the held-out tokens to the curve."""
        (total,) = self._together.total(self._judged(numbers, autocast) for numbers in self._held_out)
        self.curve.append({"step": float(step), "learning_rate": lr, "kl": float(total) / self._judged_tokens})

    def _judged(self, numbers: Iterable[int], autocast: AbstractContextManager[object]) -> list[torch.Tensor]:
        """Return the divergence of some batches, summed over their tokens, `[]` float64."""
        total = 0.0
        for number in numbers:
            self._context.world.check()
            total += float(self._divergence(number, autocast))
        return [torch.tensor(total, dtype=torch.float64, device="cpu")]

    def _tokens(self, numbers: Iterable[int]) -> int:
        return sum(self._batches[number].tokens for number in numbers)

    def _divergence(self, number: int, autocast: AbstractContextManager[object]) -> torch.Tensor:
        """Return the divergence of a batch, summed over its real tokens."""
        temperature = self._settings.temperature
        with torch.no_grad():
            teacher = self._teacher.read(number)
        with autocast:
            student = self._student.read(self._batches[number])
        if not torch.isfinite(student).all():
            return student.float().sum() * math.nan  # the caller knows the step, which a refusal by `divergence` would not name
        if self._student.head is not None and self._teacher.head is not None:
            return divergence(student, self._student.head, teacher, self._teacher.head, temperature)
        return divergence_of_logits(student, teacher, temperature)

    def _steps(self) -> Iterator[list[list[int]]]:
        """Yield the batches of each optimizer step, by leaf. Each pass over the samples is shuffled within each leaf.

        Which batches a step takes depends on the leaves, not on the number of processes.
        """
        generator = torch.Generator(device="cpu").manual_seed(derived_seed(self._context.seed, "distillation"))
        gathered: list[list[int]] = [[] for _ in self._fitted]
        while True:
            orders = [torch.randperm(len(leaf), generator=generator, device="cpu").tolist() for leaf in self._fitted]
            for turn in range(max(map(len, orders))):
                for numbers, leaf, order in zip(gathered, self._fitted, orders, strict=True):
                    numbers += [leaf[place] for place in order[turn : turn + 1]]
                if self._tokens(chain.from_iterable(gathered)) >= self._settings.batch_tokens:
                    yield gathered
                    gathered = [[] for _ in self._fitted]


def trained_of(model: nn.Module, linears: Sequence[Linear], *, on_grid: bool = False) -> list[Trained]:
    """Return what distillation changes: everything but embeddings, the head and stacked weights that are not pruned.

    Args:
        model: the pruned model.
        linears: its pruned linears.
        on_grid: whether the linears keep values of 4 bits.
    """
    masks, grids = kept_weights(linears), grids_of(linears if on_grid else ())
    frozen = frozen_parameters(model)
    return [
        Trained(name, parameter, masks.get(parameter), grids.get(parameter))
        for name, parameter in model.named_parameters()
        if parameter in masks or (parameter not in frozen and parameter.dim() <= 2)
    ]


def batches_to_train_on(
    model: nn.Module, method: LinearMethod, request: Request, settings: Distill, batches: list[Batch]
) -> list[Batch]:
    """Return what `Distill` asks for: windows of the calibration text and such as the model writes, or the batches that the method has."""
    if settings.samples is None and settings.own_samples is None:
        return batches
    text: Any = request.calibration
    if settings.samples is not None:
        text = replace(text, samples=settings.samples)
    if settings.own_samples is not None:
        text = torch.cat([text.read(model), text.continued(model, settings.own_samples)])
    found = batches_for(model, method, text, request.batch_size, max(1, settings.batch_tokens // request.leaves))
    return with_held_out(found, request.seed)


def divided(batches: Sequence[Batch], *, warns: bool = True) -> tuple[list[int], list[int]]:
    """Return the numbers of the batches to train on, and to judge on: the first held-out ones of `JUDGED` tokens together.

    What overlaps with those that judge is neither. Where that is more than half, it is trained on; `warns` says so.
    """
    fitted: list[int] = []
    judged: list[int] = []
    for number, batch in enumerate(batches):
        judges = batch.held_out and sum(batches[of].tokens for of in judged) < JUDGED
        (judged if judges else fitted).append(number)
    seen = overlapping(batches, judged)
    apart = [number for number in fitted if number not in seen]
    if 2 * len(apart) >= len(fitted):
        return apart, judged
    if warns:
        warnings.warn(
            "distillation: the text is so short that most windows overlap with those that are held out, so the divergence of these is not "
            "that of unseen text; use more text, or fewer or shorter samples",
            SparsekernWarning,
            stacklevel=4,
        )
    return fitted, judged


def _by_leaf(numbers: Sequence[int], leaves: int) -> list[list[int]]:
    """Return contiguous runs of batches, as long as one another, of which each is a leaf of all sums."""
    ends = list(accumulate(leaf_sizes(len(numbers), leaves)))
    return [list(numbers[begin:end]) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _share(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate of a step, as a share of the highest: a linear rise, then half a cosine."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
