"""The loop of continual pruning. It runs the block-wise loop for one dataset after another."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from ...data.perplexity import evaluation_windows, perplexity
from ...methods import LinearMethod
from ...models import Linear
from ...models.streaming import in_memory, stream_of
from ...ranks import World
from ...reports.continual import ContinualStep
from ...reports.report import Report
from ..batches import Batch, fingerprint
from ..blockwise.loop import BlockLoop
from ..checkpoint import differences
from ..memory import Memory
from ..plan import Plan, check_finite
from ..run import Blocks, running
from .state import State, StepFiles


@dataclass(frozen=True)
class Evaluation:
    """The tokens that perplexities are taken on.

    Attributes:
        model: the model.
        ids: token ids, by dataset.
        length: tokens in a window.
        max_memory: the most memory that a streamed model may take, see `perplexity`.
    """

    model: nn.Module
    ids: Mapping[str, torch.Tensor]
    length: int
    max_memory: int | str | None = None

    @cached_property
    def digests(self) -> dict[str, list]:
        """The digest of the windows of each dataset, and their length."""
        return {name: [_digest(evaluation_windows(self.model, ids, self.length)), self.length] for name, ids in self.ids.items()}

    def perplexity(self, name: str) -> float:
        """Return the current perplexity of the model on the dataset `name`."""
        return perplexity(self.model, self.ids[name], self.length, max_memory=self.max_memory)


@dataclass(frozen=True)
class Earlier:
    """The memory of a block loop: the totals of the step before, if there was one.

    Attributes:
        step: the step before; None for the first step.
    """

    step: StepFiles | None

    def totals(self, index: int) -> Mapping[str, torch.Tensor]:
        """Return the totals of block `index`."""
        return self.step.totals(index) if self.step else {}


class ContinualLoop:
    """The loop of `prune_continually`, whose arguments are checked."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        method: LinearMethod,
        *,
        seed: int,
        strategy: str,
        state: State,
        evaluation: Evaluation,
        progress: bool,
        world: World,
        leaves: int,
        memory: Memory | None = None,
    ) -> None:
        self.memory = memory
        self.model, self.plan, self.method, self.seed = model, plan, method, seed
        self.strategy, self.state, self.evaluation, self.progress = strategy, state, evaluation, progress
        self.world, self.leaves = world, leaves
        self.parts = [(i, part) for i, part in enumerate(plan.parts) if part]

    def run(self, datasets: Sequence[tuple[str, list[Batch]]]) -> None:
        """Prune the model for each dataset in turn. It ends pruned for all of them.

        Args:
            datasets: name and batches of each dataset.
        """
        with torch.no_grad():
            self._evaluate_dense()
            for name, batches in datasets:
                self._take_in(name, batches)
            self._write_weights(self.state.step(len(self.state.steps)))

    def check(self, settings: dict, *, abandon: bool = False) -> None:
        """Raise unless a state that is not new has this model and these settings. Nothing is written.

        Args:
            settings: settings of this call.
            abandon: the unfinished step will be dropped, so its blocks may be damaged.

        Raises:
            ValueError: another model or other settings.
        """
        if self.state.is_new:
            return
        if different := differences(self.state.settings, settings):
            said = ", ".join(f"{name} ({_difference(self.state.settings.get(name), settings.get(name))})" for name in different)
            raise ValueError(f"state: {self.state.folder} was made with another {said}")
        self._check_weights(abandon)

    def begin(self, settings: dict) -> None:
        """Store the dense weights and the settings in a new state."""
        if self.state.is_new:
            for index, linears in self.parts:
                with in_memory(self.model, index):
                    for linear in linears:
                        check_finite(linear)
                    self.state.store.put(f"dense-{index:05d}", {linear.name: linear.weight for linear in linears})
            self.state.settings = settings
            self.state.write()

    def _check_weights(self, abandon: bool) -> None:
        """Raise unless the model is dense, or has the weights of some step."""
        steps = [self.state.step(number) for number in range(1, len(self.state.steps) + 1)]
        unfinished = self.state.step(len(self.state.seen)) if self.state.under_way else None
        for index, linears in self.parts:
            known: list[Mapping[str, torch.Tensor]] = [self.state.dense_weights(index, linears)]
            known += [step.weights(index, linears) for step in steps if step.holds(index)]
            if unfinished is not None and unfinished.holds(index):
                with suppress(ValueError) if abandon else nullcontext():
                    known.append(unfinished.weights(index, linears))
            with in_memory(self.model, index):
                for linear in linears:
                    if not any(torch.equal(linear.weight.cpu(), weights[linear.name]) for weights in known):
                        raise ValueError(
                            f"state: {self.state.folder} is of another model: {linear.name} is neither its dense nor its pruned weight"
                        )

    def check_evaluation(self) -> None:
        """Raise unless all perplexities of a dataset, which are compared, are taken on the same windows.

        Raises:
            ValueError: other tokens or another length than before.
        """
        for name, (digest, length) in self.evaluation.digests.items():
            known_digest, known_length = self.state.evaluation.get(name, (digest, length))
            if length != known_length:
                raise ValueError(f"length: expected {known_length}, with which {name!r} was evaluated before, got {length}")
            if digest != known_digest:
                raise ValueError(f"evaluate[{name!r}]: expected the tokens that it was evaluated on before, got others")

    def _evaluate_dense(self) -> None:
        missing = [name for name in self.evaluation.ids if name not in self.state.dense]
        if missing:
            self._write_weights(None)
            self.state.dense |= {name: self.evaluation.perplexity(name) for name in missing}
        self.state.evaluation |= self.evaluation.digests
        self.state.write()

    def _take_in(self, name: str, batches: list[Batch]) -> None:
        """Prune for the dataset `name`, starting from the weights in the state."""
        start, state = time.perf_counter(), self.state
        if not state.under_way:
            state.seen.append([name, fingerprint(batches)])
            state.write()
        number = len(state.seen)
        files, before = state.step(number), state.step(number - 1) if number > 1 else None
        self._write_weights(before if self.strategy == "carry" else None)
        needs, report = self.method.needs, Report()
        blocks: Blocks = files
        earlier = Earlier(before) if self.strategy == "accumulate" and needs is not None else None
        with running(
            self.model,
            self.plan,
            self.method,
            None if needs is None else batches,
            seed=self.seed,
            checkpoint=blocks,
            report=report,
            progress=self.progress,
            world=self.world,
            leaves=self.leaves,
            memory=self.memory,
        ) as context:
            BlockLoop(context, earlier).run()
            if stream_of(self.model) is not None:  # it keeps no block that is pruned
                self._write_weights(files)
            changed = None if before is None else self._changed(before)
            perplexities = {known: self.evaluation.perplexity(known) for known, _ in state.seen if known in self.evaluation.ids}
        tokens = sum(batch.tokens for batch in batches)
        state.steps.append(ContinualStep(name, tokens, report.sparsity, changed, time.perf_counter() - start, perplexities))
        state.write()
        for old in range(1, number):
            state.step(old).drop()

    def _write_weights(self, step: StepFiles | None) -> None:
        """Give the model the weights of `step`, or the dense weights if that is None. A streamed model gets them as it reads a block."""
        stream = stream_of(self.model)
        for index, linears in self.parts:
            write = partial(self._write_block, step, linears)
            if stream is not None:
                stream.edit(self.model, index, write)
            if stream is None or index == len(stream.blocks):
                write(index)

    def _write_block(self, step: StepFiles | None, linears: Sequence[Linear], index: int) -> None:
        weights = step.weights(index, linears) if step else self.state.dense_weights(index, linears)
        for linear in linears:
            linear.weight.copy_(weights[linear.name])

    def _changed(self, before: StepFiles) -> float:
        changed = total = 0
        for index, linears in self.parts:
            weights = before.weights(index, linears)
            with in_memory(self.model, index):
                for linear in linears:
                    changed += int(((linear.weight == 0) != (weights[linear.name] == 0).to(linear.weight.device)).sum())
                    total += linear.weight.numel()
        return changed / total


def _digest(windows: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _difference(expected: object, got: object) -> str:
    """Return both values, shortened; of two mappings, the first entry that differs."""
    place = ""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        values = {key: (expected.get(key, "nothing"), got.get(key, "nothing")) for key in {**expected, **got}}
        key, (expected, got) = next((key, pair) for key, pair in values.items() if pair[0] != pair[1])
        place = f"{key}: "
    return f"{place}expected {str(expected)[:20]}, got {str(got)[:20]}"  # enough to tell digests apart
