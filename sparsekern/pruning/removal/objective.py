"""The objective of a removal: the answers of the pruned encoder, compared sample by sample with those of the dense one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from ..batches import Batch

Answers = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Objective:
    """A distance between the answers of student and teacher.

    Attributes:
        kind: `"kl"`, `"mse"`, `"cosine"` or `"embedding"`, see `KPrune`.
        temperature: temperature of the softmaxes of `"kl"`.
    """

    kind: str
    temperature: float

    @classmethod
    def choose(cls, kind: str, temperature: float, output: Any, config: Any) -> Objective:
        """Return the objective `kind` for a model.

        Args:
            kind: see `KPrune.objective`; `"auto"` follows the model's head, if it has one.
            temperature: see `KPrune.temperature`.
            output: an output of the model, of the class that transformers defines for its head.
            config: the model's config.

        Raises:
            ValueError: the output lacks the answers that `kind` compares.
        """
        has_logits = bool(_logits(output))
        if kind == "auto":
            several = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
            answers = "mse" if several or getattr(config, "num_labels", 2) == 1 else "kl"
            kind = answers if has_logits else "cosine"
        if kind in ("kl", "mse") and not has_logits:
            raise ValueError(f"KPrune.objective: expected 'cosine' or 'embedding' for a model without logits, got {kind!r}")
        if kind in ("cosine", "embedding") and getattr(output, "last_hidden_state", None) is None:
            raise ValueError(
                f"KPrune.objective: expected 'kl' or 'mse' for a model that returns no last hidden state, got {kind!r}"
            )
        return cls(kind, temperature)

    def answers(self, output: Any, batch: Batch) -> Answers:
        """Return the answers in float32: logits `[samples, classes]` (or one row a token), or embeddings `[samples, hidden]`."""
        if self.kind in ("cosine", "embedding"):
            pooled = mean_pooled(output.last_hidden_state.float(), batch)
            return (F.normalize(pooled, dim=-1) if self.kind == "cosine" else pooled,)
        logits = tuple(value.float() for value in _logits(output))
        if len(logits) == 2 and batch.token_mask is not None:  # start and end of a span: padding cannot be an answer
            logits = tuple(value.masked_fill(~batch.token_mask, torch.finfo(torch.float32).min / 4) for value in logits)
        return logits

    def loss(self, student: Answers, teacher: Answers, batch: Batch) -> torch.Tensor:
        """Return the loss of each sample, `[samples]`. Several answers are averaged, and so are the answers of several tokens."""
        return _sum(self._loss(s, t, batch) for s, t in zip(student, teacher, strict=True)) / len(student)

    def probed(self, student: Answers, probes: Answers) -> torch.Tensor:
        """Return a scalar whose squared gradient estimates the diagonal of the loss Hessian (Hutchinson probe).

        If student and teacher agree, the squared derivative with respect to a parameter has the second derivative of the sample's
        loss as its expectation.
        """
        return _sum((s * v).sum() for s, v in zip(student, probes, strict=True))

    def probes(self, answers: Answers, batch: Batch, generator: torch.Generator) -> Answers:
        """Return a random `v` with `E[v v^T] = d^2 loss / dz^2` for each answer `z` of the teacher, drawn sample by sample."""
        drawn = []
        for value in answers:
            probe = torch.zeros_like(value)
            for sample in range(len(value)):
                real = _rows(value, sample, batch)
                rows = value[sample][real].cpu()
                scale = (len(rows) if value.dim() == 3 else 1) * len(answers)
                probe[sample, real] = (self._probe(rows, generator) / scale**0.5).to(probe.device)
            drawn.append(probe)
        return tuple(drawn)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
        if student.shape != teacher.shape:  # one would be broadcast against the other
            raise ValueError(f"student: expected answers of shape {tuple(teacher.shape)}, got {tuple(student.shape)}")
        if self.kind == "kl":
            own, target = (F.log_softmax(value / self.temperature, -1) for value in (student, teacher))
            rows = F.kl_div(own, target, reduction="none", log_target=True).sum(-1) * self.temperature**2
        elif self.kind == "cosine":
            rows = (student - teacher).square().sum(-1) / 2
        else:
            rows = (student - teacher).square().mean(-1)
        return rows if rows.dim() == 1 else _mean_over_tokens(rows[..., None], batch)[:, 0]

    def _probe(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.kind == "kl":  # for the Fisher information: the score of an answer drawn from the teacher
            p = F.softmax(rows / self.temperature, -1)
            threshold = torch.rand(*rows.shape[:-1], 1, generator=generator)
            answer = torch.searchsorted(p.cumsum(-1), threshold).clamp_(max=rows.shape[-1] - 1)
            return F.one_hot(answer[..., 0], rows.shape[-1]) - p
        signs = torch.randint(2, rows.shape, generator=generator, dtype=rows.dtype).mul_(2).sub_(1)
        return signs if self.kind == "cosine" else signs * (2 / rows.shape[-1]) ** 0.5


def mean_pooled(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean over the real tokens of each sample, `[samples, hidden]`."""
    return _mean_over_tokens(hidden, batch)


def _mean_over_tokens(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    if batch.token_mask is None:
        return values.mean(1)
    weight = batch.token_mask[..., None].to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1)


def _sum(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, values)


def _rows(value: torch.Tensor, sample: int, batch: Batch) -> torch.Tensor | slice:
    return batch.token_mask[sample] if value.dim() == 3 and batch.token_mask is not None else slice(None)


def _logits(output: Any) -> Answers:
    if getattr(output, "start_logits", None) is not None:
        return output.start_logits, output.end_logits
    logits = getattr(output, "logits", None)
    return () if logits is None else (logits,)
