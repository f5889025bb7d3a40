"""What a pruned encoder is to keep: its answers, compared sample by sample with those of the dense one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..batches import Batch

Answers = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Objective:
    """A distance between the answers of student and teacher.

    `kind` is `"kl"`, `"mse"`, `"cosine"` or `"embedding"`, see `KPrune`; `temperature` is that of the softmaxes of `"kl"`.
    """

    kind: str
    temperature: float

    @classmethod
    def choose(cls, kind: str, temperature: float, output: object, config) -> Objective:
        """Return the objective `kind` for a model with such an output; `"auto"` goes by its head, if it has one.

        Raises:
            ValueError: the output does not have what `kind` compares.
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

    def answers(self, output: object, batch: Batch) -> Answers:
        """Return what is compared, float32: logits `[samples, classes]` (or a row a token), or embeddings `[samples, hidden]`."""
        if self.kind in ("cosine", "embedding"):
            pooled = mean_pooled(output.last_hidden_state.float(), batch)
            return (F.normalize(pooled, dim=-1) if self.kind == "cosine" else pooled,)
        logits = tuple(value.float() for value in _logits(output))
        if len(logits) == 2 and batch.token_mask is not None:  # start and end of a span: padding cannot be an answer
            logits = tuple(value.masked_fill(~batch.token_mask, torch.finfo(torch.float32).min / 4) for value in logits)
        return logits

    def loss(self, student: Answers, teacher: Answers, batch: Batch) -> torch.Tensor:
        """Return the loss of each sample, `[samples]`; several answers are averaged, and so are tokens that each have one."""
        return sum(self._loss(s, t, batch) for s, t in zip(student, teacher, strict=True)) / len(student)

    def probed(self, student: Answers, probes: Answers) -> torch.Tensor:
        """Return a scalar whose squared gradient estimates the diagonal of the loss Hessian (Hutchinson probe).

        That is: its squared derivative by a parameter has the second derivative of the sample's loss as its expectation, if student
        and teacher agree.
        """
        return sum((s * v).sum() for s, v in zip(student, probes, strict=True))

    def probes(self, answers: Answers, batch: Batch, generator: torch.Generator) -> Answers:
        """Return, for each answer `z` of the teacher, a random `v` with `E[v v^T] = d^2 loss / dz^2` at `z`, drawn sample by sample."""
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
        if student.shape != teacher.shape:  # or one would be broadcast against the other
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
        if self.kind == "kl":  # the Fisher information: the score of an answer that the teacher itself draws
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


def _rows(value: torch.Tensor, sample: int, batch: Batch) -> torch.Tensor | slice:
    return batch.token_mask[sample] if value.dim() == 3 and batch.token_mask is not None else slice(None)


def _logits(output: object) -> Answers:
    if getattr(output, "start_logits", None) is not None:
        return output.start_logits, output.end_logits
    logits = getattr(output, "logits", None)
    return () if logits is None else (logits,)
