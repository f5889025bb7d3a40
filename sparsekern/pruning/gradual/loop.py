"""The loop of `Gradual`: prune in steps and train after each. A killed run is resumed with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..._counts import nonzeros
from ...methods import Gradual
from ...models import Linear
from ...pattern import Pattern
from ...reports import LayerReport, Report
from ...training.keep_sparsity import SparsityKeeper
from ..batches import Batch
from ..checkpoint import Checkpoint
from ..plan import Plan, Request, plan_linears, planned_blocks
from ..run import Loop, RunContext
from ..seeds import derived_seed, seeded, torch_seeded
from ..session import batches_for, prepared
from ..tuning.masters import float32_masters
from ..tuning.trainable import check_trainable, not_finite, predicted_tokens, target_mask
from .interrupt import interrupt_deferred
from .training_state import TrainingState


class GradualLoop(Loop[Plan, Gradual, Report, Checkpoint]):
    """The loop of `GradualMethod`."""

    def __init__(self, context: RunContext[Plan, Gradual, Report, Checkpoint]) -> None:
        super().__init__(context)
        self.model, self.bar = context.model, context.progress
        self.batches = [batch for batch in context.batches if predicted_tokens(batch)]
        self.state = TrainingState(context.checkpoint, dict(context.model.named_parameters()))

    @classmethod
    def make_plan(cls, model: nn.Module, method: Gradual, request: Request) -> tuple[Plan, list[Batch] | None]:
        if request.report_error:
            raise ValueError(f"report_error: {type(method).__name__} has no errors of layers to report")
        plan = plan_linears(model, method, request)
        if not method.trains:
            return plan, None
        batches = batches_for(model, method, request.calibration, request.batch_size)
        with prepared(model, request.seed):
            check_trainable(model, batches)
        return plan, batches

    def run(self) -> None:
        clock = self.context.clock
        if self.method.trains:
            self.bar.count_steps(sum(len(self._batches_of_steps(step)) for step in range(1, self.method.steps + 1)))
        masters = float32_masters(self.model.parameters(), mixed_precision=self.method.mixed_precision)
        with masters as (autocast, _), interrupt_deferred() as interrupted:
            done, masks = self.state.load()
            self.context.report.training = self.state.curve
            self.bar.steps_done(len(self.state.curve))
            for step in range(done + 1, self.method.steps + 1):
                if masks is None:
                    with clock.phase("solve"):
                        self._prune(step)
                if self.method.trains:
                    with clock.phase("train"), SparsityKeeper(self.plan.linears, masks) as keeper:
                        self._train(step, keeper, autocast, interrupted)
                    with clock.phase("write"):
                        self.state.finish_step(step)
                masks = None  # only the step that had begun has masks to resume with
                if interrupted():  # outside of training, or while the step was being stored
                    raise KeyboardInterrupt
        if self.method.trains:
            self._check_finite(", rounded to the model's dtype")
        for linear in self.plan.linears:
            self.context.report.layers.append(layer := self._layer_report(linear))
            if not self.method.trains:
                self.bar.layer_done(layer)

    def _prune(self, step: int) -> None:
        criterion = self.method.chooser
        patterns: dict[str, Pattern] = {}
        for name, pattern in self.plan.patterns.items():
            if (reached := self.method.pattern_after(step, pattern)) is not None:
                patterns[name] = reached
        blocks = planned_blocks(self.model, self.plan, patterns)
        patterns = criterion.allocate(blocks, patterns)
        for linear in (linear for block in blocks for linear in block.linears):
            # the same numbers in each step, so that random zeros stay where they are
            with seeded(self.context.seed, linear.name):
                linear.weight.copy_(criterion.solve(linear.weight, None, patterns[linear.name]).weight)

    def _train(self, step: int, keeper: SparsityKeeper, autocast: torch.autocast, interrupted: Callable[[], bool]) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = _optimizer(parameters, self.method)
        self.state.restore_optimizer(optimizer)
        micro_batches = self._batches_of_steps(step)
        self.model.train()
        try:
            for index in range(self.state.steps_done, len(micro_batches)):
                rate = self.method.learning_rate * _rate_share(index, len(micro_batches), self.method.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batches = [self.batches[i] for i in micro_batches[index]]
                with torch_seeded(derived_seed(self.context.seed, f"{step} {index}"), parameters[0].device):  # for dropout
                    loss = self._optimizer_step(optimizer, parameters, batches, autocast)
                if not loss < float("inf"):
                    raise ValueError(
                        f"Gradual.learning_rate: expected a finite loss, got {loss} after {len(self.state.curve)} optimizer steps; lower it"
                    )
                self.state.curve.append({"step": step, "sparsity": keeper.sparsity, "learning_rate": rate, "loss": loss})
                self.bar.step_done(f"step {step}/{self.method.steps} loss {loss:.3f}")
                self.state.save_now_and_then(step, index + 1, partial(self.state.tensors_of, optimizer, keeper), now=interrupted())
                if interrupted():
                    raise KeyboardInterrupt
            self._check_finite()  # the last step's loss was taken before it
        finally:
            self.model.eval()
            self.model.zero_grad()

    def _check_finite(self, rounded: str = "") -> None:
        if found := not_finite(self.model):
            when = f"after {len(self.state.curve)} optimizer steps{rounded}"
            raise ValueError(f"Gradual.learning_rate: expected finite weights, got {found} {when}; lower it")

    def _optimizer_step(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], batches: list[Batch], autocast: torch.autocast
    ) -> float:
        """Take one step on the mean loss of all predicted tokens of `batches`, and return the loss before it."""
        predicted = sum(map(predicted_tokens, batches))
        total = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        for batch in batches:
            with torch.enable_grad():
                with autocast:
                    logits = self.model(**batch.inputs, use_cache=False).logits
                loss = _summed_loss(logits, batch) / predicted
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, self.method.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    def _batches_of_steps(self, step: int) -> list[list[int]]:
        """Return the batch indices of each optimizer step of pruning step `step`. Each epoch is shuffled, and its end ends a step."""
        generator = torch.Generator().manual_seed(derived_seed(self.context.seed, f"order {step}"))
        wanted, epochs = self.method.train_steps, 0
        steps: list[list[int]] = []
        while len(steps) < wanted if wanted is not None else epochs < self.method.epochs:
            gathered: list[int] = []
            for index in torch.randperm(len(self.batches), generator=generator).tolist():
                gathered.append(index)
                if sum(predicted_tokens(self.batches[i]) for i in gathered) >= self.method.batch_tokens:
                    steps.append(gathered)
                    gathered = []
            if gathered:
                steps.append(gathered)
            epochs += 1
        return steps[:wanted]

    def _layer_report(self, linear: Linear) -> LayerReport:
        zeros = linear.weight.numel() - int(nonzeros(linear.weight))
        return LayerReport(linear.name, str(self.plan.patterns[linear.name]), linear.shape, zeros, None, 0.0)


def _summed_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = target_mask(batch)
    logits, targets = logits[:, :-1], batch.inputs["input_ids"][:, 1:].long()
    logits, targets = (logits.flatten(0, 1), targets.flatten()) if mask is None else (logits[mask], targets[mask])
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _optimizer(parameters: list[nn.Parameter], method: Gradual) -> torch.optim.AdamW:
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": method.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=method.learning_rate, fused=True)


def _rate_share(index: int, steps: int, warmup: float) -> float:
    """Return the learning rate of optimizer step `index` of `steps`, as a share of the highest."""
    rising = round(warmup * steps)
    return (index + 1) / rising if index < rising else (steps - index) / (steps - rising)
