"""Gradual pruning in steps, by a criterion that needs no data, with fine-tuning after each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..pattern import NM, Pattern, Unstructured
from ._fields import check_choice, choice, method, mixed_precision, number, settings_of, whole
from .base import GradualMethod, LinearMethod, PlannedBlock
from .magnitude import Magnitude
from .random import Random
from .structured import Structured

CRITERIA: dict[str, type[LinearMethod]] = {criterion.name: criterion for criterion in (Magnitude, Random, Structured)}
EXPONENT = {"cubic": 3, "linear": 1}


@dataclass(frozen=True)
class Gradual(GradualMethod):
    """Prune in `steps` steps, each by `criterion` to the sparsity of the schedule, and train the whole model after each.

    After step `t` of `n` the sparsity is `s_t = s (1 - (1 - t/n)^3)`. For an N:M pattern, step `t` keeps `M (1 - s_t)` of M,
    rounded up.

    Training minimises the mean loss of the next token over the calibration ids, without padding, by AdamW. Pruned weights stay
    zero. Each step has a new optimizer, whose learning rate rises linearly over the `warmup` share of the optimizer steps and
    falls linearly to zero. A model in half precision is trained as float32 master weights under bfloat16 autocast, and rounded
    once at the end. Every parameter that requires a gradient is trained. `prune`'s `batch_size` is the number of samples that run
    at once. With `out` in `prune`, the first Ctrl-C finishes the current optimizer step and keeps it.

    `steps=1` is one-shot pruning with fine-tuning after it. With `epochs=0` the criterion prunes without training. The method
    is inspired by Gholami and Omar, Can pruning make large language models more efficient?, arXiv 2310.04573, but does not
    reproduce its settings: only the abstract could be read.

    Example:
        >>> method = sparsekern.Gradual(criterion="magnitude", steps=2, train_steps=1)
        >>> report = sparsekern.prune(model, method, 0.5, calibration=ids, progress=False)
        >>> [round(step["sparsity"], 4) for step in report.training]
        [0.4375, 0.5]

    Source: the schedule is equation 1 of Zhu and Gupta, To prune, or not to prune, 2017. Training after each step follows Han et
    al., 2015, with the learning rate rewound as in Renda et al., Comparing rewinding and fine-tuning, 2020.
    """

    name: ClassVar[str] = "gradual"

    criterion: LinearMethod | str = method(
        "magnitude",
        expected="'magnitude', 'random', 'structured' or a config of one",
        help="method that chooses the weights to prune, such as Magnitude(scope='global')",
    )
    steps: int = whole(4, at_least=1, help="pruning steps n")
    schedule: str = choice("cubic", ("cubic", "linear"), help="how the sparsity grows; linear is s_t = s t/n")
    epochs: int = whole(1, at_least=0, help="passes over the calibration ids after each step; 0 does not train")
    train_steps: int | None = whole(None, at_least=0, help="optimizer steps after each pruning step, instead of whole epochs")
    batch_tokens: int = whole(
        8192, at_least=1, help="minimum of predicted tokens in an optimizer step; whole calibration batches are accumulated"
    )
    learning_rate: float = number(1e-4, above=0, help="highest learning rate of AdamW")
    warmup: float = number(0.1, at_least=0, at_most=1, help="share of a step's optimizer steps in which the learning rate rises")
    weight_decay: float = number(0.0, at_least=0, help="weight decay of AdamW, on matrices only")
    clip: float = number(1.0, above=0, help="largest norm of the gradient")
    mixed_precision: bool = mixed_precision()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.criterion, str):
            check_choice("Gradual.criterion", self.criterion, tuple(CRITERIA))
            object.__setattr__(self, "criterion", self.chooser)
        elif not isinstance(self.criterion, tuple(CRITERIA.values())):
            expected = settings_of(Gradual)["criterion"].expected
            raise TypeError(f"Gradual.criterion: expected {expected}, got {self.criterion!r}")

    @property
    def chooser(self) -> LinearMethod:
        """The config of `criterion`."""
        return CRITERIA[self.criterion]() if isinstance(self.criterion, str) else self.criterion

    @property
    def trains(self) -> bool:
        return bool(self.epochs if self.train_steps is None else self.train_steps)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "criterion": self.chooser.settings()}

    def allocate(self, blocks: Sequence[PlannedBlock], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        self.chooser.allocate(blocks, patterns)  # refuses what it cannot prune before any work; each step allocates again
        return dict(patterns)

    def share(self, step: int) -> float:
        """Return the share of the final sparsity after pruning step `step`, which counts from 1 to `steps`."""
        return 1 - (1 - step / self.steps) ** EXPONENT[self.schedule]

    def pattern_after(self, step: int, pattern: Pattern) -> Pattern | None:
        """Return the pattern after pruning step `step`. It is None before the schedule reaches the first zero of N:M."""
        if step == self.steps:
            return pattern
        sparsity = pattern.sparsity * self.share(step)
        if not isinstance(pattern, NM):
            return Unstructured(sparsity)
        kept = max(math.ceil(pattern.m * (1 - sparsity) - 1e-9), pattern.n)
        return NM(kept, pattern.m) if kept < pattern.m else None
