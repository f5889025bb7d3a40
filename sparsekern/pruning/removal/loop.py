"""`prune` with a method that removes whole units: sub-layers bottom to top, each decided, fitted and then left behind.

What is in front of the sub-layer at hand is never run again: its output is stored for every calibration batch, once as the pruned
model has it and once as the dense model would. The model itself is cut at the very end, so a run that fails leaves it as it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ...methods.kprune import KPrune, predictive_knowledge, search, tuned_projection
from ...models.encoder import Encoder, SubLayer
from ...models.units import keep_units, record_units, recorded_units
from ...pattern import parse_pattern
from ...reports.removal import RemovalReport, SubLayerReport
from ...runtime import weight_bytes
from ..batches import Batch, Calibration
from ..batches import fingerprint as calibration_fingerprint
from ..checkpoint import Checkpoint, finish, model_fingerprint
from ..plan import PatternLike, check_device, check_finite
from ..progress import Clock, Notices, Progress, warnings_named
from ..session import batches_for, check_saveable, environment, prepared, save_model
from .objective import Answers, Objective


def prune_units(
    model: nn.Module,
    method: KPrune,
    pattern: PatternLike,
    calibration: Calibration | None,
    *,
    seed: int,
    out: str | os.PathLike | None,
    resume: bool,
    progress: bool,
    batch_size: int | None,
    complete: Callable[[RemovalReport], None] | None,
) -> RemovalReport:
    """Remove heads and neurons of an encoder in place. Arguments as in `sparsekern.prune`, which calls this.

    Raises:
        ValueError, TypeError: as `prune` does; a model that is no encoder of the known make, or was cut before; a share that leaves
            nothing; a calibration sample that is all padding.
    """
    start = time.perf_counter()
    share = method.share(parse_pattern(pattern))
    if resume and out is None:
        raise ValueError("resume: expected out, the folder of the run to go on with")
    encoder = encoder_to_cut(model)
    batches = batches_for(model, method, calibration, batch_size)
    _check_samples(batches)
    costs = Costs.of(encoder, batches, method.budget)
    remaining = _remaining(encoder, costs, share)
    settings = {"method": method.settings(), "pattern": f"{share:g}", "seed": seed, "calibration": calibration_fingerprint(batches)}
    checkpoint = None
    if out is not None:
        check_saveable(model)
        settings["model"] = model_fingerprint(model)
        checkpoint = Checkpoint(out, settings, environment(model), resume=resume)
    report = RemovalReport(
        settings=settings, versions=environment(model), calibration_tokens=sum(batch.tokens for batch in batches)
    )
    before, dense_bytes = _sizes(model, encoder, batches), weight_bytes(model)
    bar = Progress(len(encoder.sublayers), progress)
    clock = Clock(next(model.parameters()).device)
    try:
        with prepared(model, seed):
            cuts = _Run(encoder, method, batches, costs, remaining, seed, checkpoint, report, bar, clock).decide_all()
            _apply(encoder, cuts)
        after = _sizes(model, encoder, batches)
        report.flops, report.parameters, report.model_parameters = zip(before, after, strict=True)
        if out is not None:
            with clock.phase("write"):
                save_model(model, out, "dense")
    finally:
        bar.close()
    report.seconds = {**clock.seconds, "total": time.perf_counter() - start}
    if out is not None:
        finish(out, report, dense_bytes, complete)
    return report


def encoder_to_cut(model: nn.Module) -> Encoder:
    """The sub-layers of `model`, whose weights are on one device and finite.

    Raises:
        ValueError: see `prune_units`.
    """
    if recorded_units(getattr(model, "config", None)):  # of which `Encoder` might not know the blocks again
        raise ValueError(
            "model: expected a model with all its heads and neurons, got one that was cut before; start from the dense one"
        )
    encoder = Encoder(model)
    check_device(model)
    for linear in encoder.linears:
        check_finite(linear)
    return encoder


@dataclass(frozen=True)
class Costs:
    """What one head and one neuron take of the budget."""

    heads: float
    neurons: float

    @classmethod
    def of(cls, encoder: Encoder, batches: list[Batch], budget: str) -> Costs:
        """FLOPs are those of the matrix products, two for a multiplication and an addition, a sample on average.

        A head of `c` channels has four projections between `d` and `c` and two products of `n` queries with `n` keys:
        `8 d c n + 4 n^2 c`. A neuron has two weights for each of `d`: `4 d n`.
        """
        head = encoder.sublayers[0]
        hidden, channels = head.out.out_features, head.head_size
        if budget == "parameters":
            return cls(4 * hidden * channels + 3 * channels, 2 * hidden + 1)
        lengths = torch.cat([_lengths(batch) for batch in batches]).double()
        n, squares = float(lengths.mean()), float(lengths.square().mean())
        return cls(8 * hidden * channels * n + 4 * squares * channels, 4 * hidden * n)

    def unit(self, sublayer: SubLayer) -> float:
        return getattr(self, sublayer.kind)

    def total(self, encoder: Encoder) -> float:
        return sum(sublayer.units * self.unit(sublayer) for sublayer in encoder.sublayers)


@dataclass(frozen=True)
class Cut:
    """What becomes of a sub-layer: the units that stay, and the output projection that reads them."""

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class _Stored:
    """A calibration batch in front of the sub-layer at hand, and what the dense model answered in the end."""

    batch: Batch
    attention_mask: torch.Tensor | None
    answers: Answers
    probes: Answers
    student: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor | None = None  # the residual stream behind the sub-layer at hand, as the dense model has it


class _Run:
    """One call of `prune_units`, everything being checked."""

    def __init__(
        self,
        encoder: Encoder,
        method: KPrune,
        batches: list[Batch],
        costs: Costs,
        remaining: float,
        seed: int,
        checkpoint: Checkpoint | None,
        report: RemovalReport,
        bar: Progress,
        clock: Clock,
    ) -> None:
        self.encoder, self.sublayers, self.method, self.batches = encoder, encoder.sublayers, method, batches
        self.costs, self.remaining, self.seed = costs, remaining, seed
        self.checkpoint, self.report, self.bar, self.clock, self.notices = checkpoint, report, bar, clock, Notices()

    def decide_all(self) -> list[Cut]:
        cuts = []
        with self.encoder.opened(self.batches[0].inputs) as self.chain:
            with self.clock.phase("capture"):
                self.stored = self._capture()
            for index, sublayer in enumerate(self.sublayers):
                restored = self._restore(index)
                begin = self.clock.now()
                cut = restored[0] if restored else self._decide(index)
                with self.clock.phase("forward"):
                    error = self._advance(sublayer, cut)
                if restored:
                    layer = restored[1]
                    self.report.resumed_blocks += 1
                else:
                    seconds = self.clock.now() - begin
                    layer = SubLayerReport(sublayer.name, sublayer.kind, sublayer.units, len(cut.kept), error, seconds)
                    self._save(index, cut, layer)
                self.remaining -= len(cut.kept) * self.costs.unit(sublayer)
                self.report.layers.append(layer)
                self.bar.layer_done(layer)
                cuts.append(cut)
        return cuts

    def _capture(self) -> list[_Stored]:
        generator = torch.Generator().manual_seed(self.seed)
        stored, self.objective = [], None
        for batch in self.batches:
            output = self.chain.run(batch.inputs)
            if self.objective is None:
                self.objective = Objective.choose(self.method.objective, self.method.temperature, output, self.encoder.model.config)
            answers = self.objective.answers(output, batch)
            probes = self.objective.probes(answers, batch, generator)
            embedded = self.chain.embedded
            stored.append(_Stored(batch, self.chain.attention_mask, answers, probes, embedded, embedded))
        return stored

    def _decide(self, index: int) -> Cut:
        sublayer = self.sublayers[index]
        with self.clock.phase("score"):
            scores = self._scores(index)
        with self.clock.phase("search"):
            costs = [self.costs.unit(above) for above in self.sublayers[index:]]
            keep = search(scores, costs, self.remaining)[0]
        kept = keep.nonzero()[:, 0].to(sublayer.out.weight.device)
        cut = Cut(kept, sublayer.out.weight[:, _features_of(sublayer, kept)], sublayer.out.bias)
        if not self.method.tuning:
            return cut
        with self.clock.phase("tune"), warnings_named(f"{sublayer.name} {sublayer.kind}"):
            return self._tuned(sublayer, cut)

    def _scores(self, index: int) -> list[torch.Tensor]:
        above = self.sublayers[index:]
        device = above[0].out.weight.device
        predictive = [torch.zeros(sublayer.units, dtype=torch.float64, device=device) for sublayer in above]
        sums = [torch.zeros(sublayer.out.in_features, device=device) for sublayer in above]
        for stored in self.stored:
            found, gradients = self._gradients(index, stored)
            for place, (sublayer, features, gradient) in enumerate(zip(above, found, gradients, strict=True)):
                predictive[place] += predictive_knowledge(features, gradient, sublayer.head_size)
                rows, row_mask = stored.batch.flatten(features)
                try:
                    ops.feature_norm_(sums[place], rows, row_mask=row_mask)
                except ValueError as error:
                    raise ValueError(f"{sublayer.name} {sublayer.kind}: {error}") from error
        samples = sum(stored.batch.shape[0] for stored in self.stored)
        scores = []
        for sublayer, pred, energy in zip(above, predictive, sums, strict=True):
            rep = ops.head_neuron_scores(energy, sublayer.out.weight, sublayer.head_size) / self.report.calibration_tokens
            scores.append(self.method.scores(pred / samples, rep, self.costs.unit(sublayer), sublayer.kind == "heads"))
        return scores

    def _gradients(self, index: int, stored: _Stored) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """The features of all sub-layers from `index` on, and the gradients of the samples' objective by them."""
        found: list[torch.Tensor] = []

        def visit(place: int, features: torch.Tensor) -> torch.Tensor:
            if place == index:  # nothing below it is to be differentiated
                features = features.detach().requires_grad_()
            found.append(features)
            return features

        with torch.enable_grad():
            output = self.chain.run(stored.batch.inputs, index, stored.student, visit)
            answers = self.objective.answers(output, stored.batch)
            if index == 0 or self.method.curvature == "fisher":
                total = self.objective.probed(answers, stored.probes)
            else:
                total = self.objective.loss(answers, stored.answers, stored.batch).sum()
            gradients = torch.autograd.grad(total, found)
        return [features.detach() for features in found], gradients

    def _target(self, sublayer: SubLayer, stored: _Stored) -> torch.Tensor:
        if stored.target is None:
            stored.target = stored.teacher + sublayer.out(sublayer.features(stored.teacher, stored.attention_mask))
        return stored.target

    def _kept_features(self, sublayer: SubLayer, stored: _Stored, kept: torch.Tensor) -> torch.Tensor:
        return sublayer.features(stored.student, stored.attention_mask)[..., _features_of(sublayer, kept)]

    def _tuned(self, sublayer: SubLayer, cut: Cut) -> Cut:
        extra = int(self.method.tune_bias)
        size = cut.weight.shape[1] + extra
        if size == 0:
            return cut
        self.notices.few_tokens(f"{sublayer.name} {sublayer.kind}", self.report.calibration_tokens, cut.weight.shape[1])
        gram = torch.zeros(size, size, device=cut.weight.device)
        cross = torch.zeros(len(cut.weight), size, device=cut.weight.device)
        for stored in self.stored:
            features = self._kept_features(sublayer, stored, cut.kept)
            missing = self._target(sublayer, stored) - stored.student - F.linear(features, cut.weight, cut.bias)
            rows, row_mask = stored.batch.flatten(F.pad(features.float(), (0, extra), value=1.0))
            ops.gram_(gram, rows, row_mask=row_mask)
            ops.cross_gram_(cross, stored.batch.flatten(missing.float())[0], rows, row_mask=row_mask)
        return Cut(cut.kept, *tuned_projection(cut.weight, cut.bias, gram, cross, self.method.ridge))

    def _advance(self, sublayer: SubLayer, cut: Cut) -> float:
        """Move student and teacher behind the sub-layer; returns the relative squared error between them before the LayerNorm."""
        error = energy = 0.0
        for stored in self.stored:
            target = self._target(sublayer, stored)
            output = stored.student + F.linear(self._kept_features(sublayer, stored, cut.kept), cut.weight, cut.bias)
            rows, row_mask = stored.batch.flatten(target)
            off = rows - stored.batch.flatten(output)[0]
            if row_mask is not None:
                rows, off = rows[row_mask], off[row_mask]
            error += float(off.double().square().sum())
            energy += float(rows.double().square().sum())
            stored.student, stored.teacher, stored.target = sublayer.norm(output), sublayer.norm(target), None
        return error / energy if energy else 0.0

    def _save(self, index: int, cut: Cut, layer: SubLayerReport) -> None:
        if self.checkpoint:
            with self.clock.phase("write"):
                self.checkpoint.save(index, {"kept": cut.kept, "weight": cut.weight, "bias": cut.bias}, [layer])

    def _restore(self, index: int) -> tuple[Cut, SubLayerReport] | None:
        found = self.checkpoint.read(index, SubLayerReport.from_dict) if self.checkpoint else None
        if found is None:
            return None
        tensors, (layer,) = found
        device = self.sublayers[index].out.weight.device
        return Cut(*(tensors[name].to(device) for name in ("kept", "weight", "bias"))), layer


def _apply(encoder: Encoder, cuts: list[Cut]) -> None:
    for sublayer, cut in zip(encoder.sublayers, cuts, strict=True):
        keep_units(sublayer, cut.kept)
        sublayer.out.weight.copy_(cut.weight)
        sublayer.out.bias.copy_(cut.bias)
    record_units(encoder)


def _features_of(sublayer: SubLayer, kept: torch.Tensor) -> torch.Tensor:
    return (kept[:, None] * sublayer.head_size + torch.arange(sublayer.head_size, device=kept.device)).flatten()


def _lengths(batch: Batch) -> torch.Tensor:
    samples, length = batch.shape
    return torch.full((samples,), length) if batch.token_mask is None else batch.token_mask.sum(1).cpu()


def _check_samples(batches: list[Batch]) -> None:
    for batch in batches:
        if (empty := (_lengths(batch) == 0).nonzero()).numel():
            raise ValueError(
                f"calibration: sample {batch.first_sample + int(empty[0])} is all padding, expected at least one token"
            )


def _remaining(encoder: Encoder, costs: Costs, share: float) -> float:
    total, dearest = costs.total(encoder), max(costs.heads, costs.neurons)
    remaining = (1 - share) * total
    if remaining < dearest:  # or else the one that is worth most might be one that cannot be kept
        most = 1 - dearest / total
        raise ValueError(f"pattern: a share of {share:g} leaves nothing of this model, expected at most {most:.6g}")
    return remaining


def _sizes(model: nn.Module, encoder: Encoder, batches: list[Batch]) -> tuple[float, int, int]:
    """FLOPs and parameters of the heads and neurons, and all parameters of the model."""
    flops, parameters = (Costs.of(encoder, batches, budget).total(encoder) for budget in ("flops", "parameters"))
    return flops, int(parameters), sum(parameter.numel() for parameter in model.parameters())
