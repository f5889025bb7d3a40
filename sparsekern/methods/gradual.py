"""Gradual pruning: a little at a time by a criterion without data, with fine-tuning after each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..models import Linear
from ..pattern import NM, Pattern, Unstructured
from .base import Method, check_choice
from .magnitude import Magnitude
from .random import Random
from .structured import Structured

CRITERIA = {method.name: method for method in (Magnitude, Random, Structured)}
EXPONENT = {"cubic": 3, "linear": 1}


@dataclass(frozen=True)
class Gradual(Method):
    """Prune in `steps` steps, each by `criterion` to the sparsity of the schedule, and train the whole model after each.

    After step `t` of `n` the sparsity is `s_t = s (1 - (1 - t/n)^3)`. An N:M pattern goes by its N: step `t` keeps `M (1 - s_t)` of M,
    rounded up. Training minimises the mean loss of the next token over the calibration ids (padding left out) with AdamW, pruned weights
    held at zero; in each step the learning rate rises linearly over the `warmup` share of its optimizer steps and falls linearly to
    zero, and the optimizer starts anew. A model in half precision is trained as float32 master weights under bfloat16 autocast, and
    rounded back once at the end. Every parameter that requires a gradient is trained. With `prune`'s `out`, the first Ctrl-C ends the
    optimizer step at hand and keeps it.

    `steps=1` is one-shot pruning with fine-tuning after it, and without training (`epochs=0`) the grid of criteria alone. It is inspired
    by what Gholami and Omar study (Can pruning make large language models more efficient?, arXiv 2310.04573); of that paper only
    the abstract could be read, so nothing here reproduces its settings.

    Args:
        criterion: which weights go: `"magnitude"`, `"random"` or `"structured"`, or a config such as `Magnitude(scope="global")`.
        steps: pruning steps `n`.
        schedule: `"cubic"`, or `"linear"` for `s_t = s t/n`.
        epochs: passes over the calibration ids after each step; 0 does not train.
        train_steps: optimizer steps after each pruning step, instead of whole epochs.
        batch_tokens: predicted tokens in an optimizer step, at least: whole calibration batches are accumulated (a step ends with
            its epoch). How many samples run at once is `prune`'s `batch_size`.
        learning_rate: the highest.
        warmup: share of a step's optimizer steps.
        weight_decay: AdamW's, of matrices only.
        clip: the largest norm of the gradient.

    Source: the schedule is equation 1 of Zhu and Gupta, To prune, or not to prune, 2017; training on after each step follows Han et al.,
    2015, with the learning rate rewound as in Renda et al., Comparing rewinding and fine-tuning, 2020.
    """

    name: ClassVar[str] = "gradual"
    statistic: ClassVar[None] = None
    whole_model: ClassVar[bool] = True

    criterion: Method | str = "magnitude"
    steps: int = 4
    schedule: str = "cubic"
    epochs: int = 1
    train_steps: int | None = None
    batch_tokens: int = 8192
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.criterion, str):
            check_choice("Gradual.criterion", self.criterion, tuple(CRITERIA))
            object.__setattr__(self, "criterion", CRITERIA[self.criterion]())
        elif not isinstance(self.criterion, tuple(CRITERIA.values())):
            raise TypeError(
                f"Gradual.criterion: expected {', '.join(map(repr, CRITERIA))} or a config of one, got {self.criterion!r}"
            )
        check_choice("Gradual.schedule", self.schedule, tuple(EXPONENT))
        _check_whole("steps", self.steps, 1)
        _check_whole("epochs", self.epochs, 0)
        _check_whole("batch_tokens", self.batch_tokens, 1)
        if self.train_steps is not None:
            _check_whole("train_steps", self.train_steps, 0)
        _check_number("learning_rate", self.learning_rate, above=0)
        _check_number("weight_decay", self.weight_decay)
        _check_number("clip", self.clip, above=0)
        _check_number("warmup", self.warmup, most=1)

    @property
    def trains(self) -> bool:
        return bool(self.epochs if self.train_steps is None else self.train_steps)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "criterion": self.criterion.settings()}

    def arrange(self, model: nn.Module, blocks: Sequence[Sequence[Linear]], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        self.criterion.arrange(model, blocks, patterns)  # for what it refuses, before any work; it arranges again in every step
        return dict(patterns)

    def share(self, step: int) -> float:
        """The share of the final sparsity after pruning step `step`, from 1 to `steps`."""
        return 1 - (1 - step / self.steps) ** EXPONENT[self.schedule]

    def pattern_after(self, step: int, pattern: Pattern) -> Pattern | None:
        """What a linear is pruned to in pruning step `step`; None where the schedule has not got as far as the first zero of N:M."""
        if step == self.steps:
            return pattern
        sparsity = pattern.sparsity * self.share(step)
        if not isinstance(pattern, NM):
            return Unstructured(sparsity)
        kept = max(math.ceil(pattern.m * (1 - sparsity) - 1e-9), pattern.n)
        return NM(kept, pattern.m) if kept < pattern.m else None


def _check_whole(field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Gradual.{field}: expected a whole number of at least {least}, got {value!r}")


def _check_number(field: str, value: object, *, above: float | None = None, most: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value >= 0 if above is None else value > above) or value > most:
        limit = "of at least 0" if above is None else f"above {above:g}"
        raise ValueError(
            f"Gradual.{field}: expected a number {limit}{f' and at most {most:g}' if most < math.inf else ''}, got {value!r}"
        )
