"""The loop of `Gradual`: prune in steps and train after each. A killed run is resumed with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

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
from .interrupt import interrupt_deferred
from .training_state import TrainingState

PROBE_TOKENS = 8


class GradualLoop(Loop[Plan, Gradual, Report, Checkpoint]):
    """The loop of `GradualMethod`."""

    def __init__(self, context: RunContext[Plan, Gradual, Report, Checkpoint]) -> None:
        super().__init__(context)
        self.model, self.bar = context.model, context.progress
        self.batches = [batch for batch in context.batches if _predicted(batch)]
        self.state = TrainingState(context.checkpoint, context.model)

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
        with _float32_masters(self.model) as autocast, interrupt_deferred() as interrupted:
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
                self.state.save_now_and_then(step, index + 1, optimizer, keeper, now=interrupted())
                if interrupted():
                    raise KeyboardInterrupt
            self._check_finite()  # the last step's loss was taken before it
        finally:
            self.model.eval()
            self.model.zero_grad()

    def _check_finite(self, rounded: str = "") -> None:
        if found := _not_finite(self.model):
            when = f"after {len(self.state.curve)} optimizer steps{rounded}"
            raise ValueError(f"Gradual.learning_rate: expected finite weights, got {found} {when}; lower it")

    def _optimizer_step(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], batches: list[Batch], autocast: torch.autocast
    ) -> float:
        """Take one step on the mean loss of all predicted tokens of `batches`, and return the loss before it."""
        predicted = sum(map(_predicted, batches))
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
                if sum(_predicted(self.batches[i]) for i in gathered) >= self.method.batch_tokens:
                    steps.append(gathered)
                    gathered = []
            if gathered:
                steps.append(gathered)
            epochs += 1
        return steps[:wanted]

    def _layer_report(self, linear: Linear) -> LayerReport:
        zeros = linear.weight.numel() - int(torch.count_nonzero(linear.weight))
        return LayerReport(linear.name, str(self.plan.patterns[linear.name]), linear.shape, zeros, None, 0.0)


def check_trainable(model: nn.Module, batches: list[Batch]) -> None:
    """Raise unless `model` predicts next tokens and can be trained, and `batches` hold tokens to predict.

    Raises:
        ValueError: no parameter requires a gradient, or one that does is not finite; every sample is shorter than two tokens; the
            model returns no logits for each position, or those of a position change with the tokens behind it.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: Gradual trains it, but none of its parameters requires a gradient (requires_grad_())")
    if found := _not_finite(model):
        raise ValueError(f"model: expected finite weights to train, got {found}")
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes or any(batch.main != "input_ids" for batch in batches):
        found = (
            type(model).__name__ if decodes else f"batches of {next(batch.main for batch in batches if batch.main != 'input_ids')}"
        )
        raise ValueError(f"model: Gradual trains causal language models on token ids, got {found}")
    batch = next(filter(_predicted, batches), None)
    if batch is None:
        raise ValueError(
            "calibration: Gradual predicts tokens from those before, so it needs samples of at least two tokens, got none"
        )
    ids = batch.inputs["input_ids"][:1, :PROBE_TOKENS]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] == 0).to(ids.dtype)  # token 1 instead of 0, 0 instead of any other
    logits, changed = (getattr(model(input_ids=tokens), "logits", None) for tokens in (ids, other))
    if logits is None or changed is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model: Gradual trains causal language models, but {type(model).__name__} returns no logits for each token"
        )
    if not torch.allclose(logits[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"model: Gradual trains causal language models, but in {type(model).__name__} the logits of a token change with those behind it"
        )


def _not_finite(model: nn.Module) -> str | None:
    """Return the first NaN or Inf of the parameters that are trained, and where it is."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (finite := torch.isfinite(parameter)).all():
            return f"{float(parameter.detach()[~finite][0])} in {name}"
    return None


def _predicted(batch: Batch) -> int:
    """Return the number of tokens of a batch that are predicted: real tokens behind a real token."""
    mask = _target_mask(batch)
    samples, length = batch.shape
    return samples * max(length - 1, 0) if mask is None else int(mask.sum())


def _target_mask(batch: Batch) -> torch.Tensor | None:
    return None if batch.token_mask is None else batch.token_mask[:, 1:] & batch.token_mask[:, :-1]


def _summed_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = _target_mask(batch)
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


@contextmanager
def _float32_masters(model: nn.Module) -> Iterator[torch.autocast]:
    """Make parameters float32 within, and round them back afterwards. Yield an autocast that lets them compute in bfloat16."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters() if parameter.dtype in (torch.bfloat16, torch.float16)}
    device = next(model.parameters()).device.type
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield torch.autocast(device, torch.bfloat16, enabled=bool(dtypes))
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
