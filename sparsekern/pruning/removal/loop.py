"""The loop of removal: the units of each sub-layer are chosen, bottom to top, and its output projection is fitted.

The sub-layers in front of the current one are not run again: their output is stored for every batch, for the pruned and for the dense
model. The model itself is cut at the very end, so a run that fails leaves it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ..._warnings import warnings_about
from ...methods.kprune import KPrune, predictive_knowledge, search, tuned_projection
from ...models.encoder import Chain, Encoder, SubLayer
from ...models.units import keep_units, record_units, recorded_units
from ...reports import RemovalReport, SubLayerReport
from ..batches import Batch
from ..checkpoint import Checkpoint
from ..plan import Request, check_device, check_finite
from ..progress import Notices
from ..run import BlockResult, Loop, RunContext
from ..session import batches_for, parameters_of
from .objective import Answers, Objective


def encoder_to_cut(model: nn.Module) -> Encoder:
    """Return the sub-layers of `model`, whose weights are on one device and finite.

    Raises:
        ValueError: the model is not an encoder of a known family, or was cut before.
    """
    if recorded_units(getattr(model, "config", None)):  # `Encoder` might not recognise its blocks
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
    """The costs of one head and one neuron, in units of the budget.

    Attributes:
        heads: the cost of one head.
        neurons: the cost of one neuron.
    """

    heads: float
    neurons: float

    @classmethod
    def of(cls, encoder: Encoder, batches: list[Batch], budget: str) -> Costs:
        """Return the costs. FLOPs are those of the matrix products of a mean sample, two for a multiplication and an addition.

        A head of `c` channels has four projections between `d` and `c`, and two products of `n` queries with `n` keys:
        `8 d c n + 4 n^2 c`. A neuron has two weights for each of `d` hidden channels: `4 d n`.

        Args:
            encoder: the encoder.
            batches: the calibration data, whose sample lengths are counted.
            budget: `"flops"` or `"parameters"`.
        """
        head = encoder.sublayers[0]
        hidden, channels = head.out.out_features, head.head_size
        if budget == "parameters":
            return cls(4 * hidden * channels + 3 * channels, 2 * hidden + 1)
        lengths = torch.cat([_lengths(batch) for batch in batches]).double()
        n, squares = float(lengths.mean()), float(lengths.square().mean())
        return cls(8 * hidden * channels * n + 4 * squares * channels, 4 * hidden * n)

    def unit(self, sublayer: SubLayer) -> float:
        """Return the cost of one unit of a sub-layer."""
        return getattr(self, sublayer.kind)

    def total(self, encoder: Encoder) -> float:
        """Return the cost of all units of an encoder."""
        return sum(sublayer.units * self.unit(sublayer) for sublayer in encoder.sublayers)


@dataclass(frozen=True)
class RemovalPlan:
    """The plan of a removal.

    Attributes:
        encoder: the sub-layers of the model.
        costs: the costs of one head and one neuron.
        remaining: the budget that may be kept.
    """

    encoder: Encoder
    costs: Costs
    remaining: float

    @property
    def steps(self) -> int:
        """The number of sub-layers, each of which is reported."""
        return len(self.encoder.sublayers)

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the result besides method, seed, calibration and model: none."""
        return {}


@dataclass(frozen=True)
class Cut:
    """The result of one sub-layer.

    Attributes:
        kept: indices of the units that remain.
        weight: weight of the output projection that reads them.
        bias: bias of that projection.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class _Stored:
    """A calibration batch in front of the current sub-layer, and the answers of the dense model.

    Attributes:
        batch: the batch.
        attention_mask: the mask that the blocks are given; None for none.
        answers: answers of the dense model.
        probes: random probes at these answers, see `Objective.probes`.
        student: hidden states of the pruned model.
        teacher: hidden states of the dense model.
        target: residual stream of the dense model behind the current sub-layer; None until it is needed.
    """

    batch: Batch
    attention_mask: torch.Tensor | None
    answers: Answers
    probes: Answers
    student: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor | None = None


class RemovalLoop(Loop[RemovalPlan, KPrune, RemovalReport, Checkpoint]):
    """The loop of `RemovalMethod`."""

    REPORT = RemovalReport
    chain: Chain  # both are set by `run`
    objective: Objective

    def __init__(self, context: RunContext[RemovalPlan, KPrune, RemovalReport, Checkpoint]) -> None:
        super().__init__(context)
        self.encoder, self.sublayers, self.costs = self.plan.encoder, self.plan.encoder.sublayers, self.plan.costs
        self.remaining, self.notices = self.plan.remaining, Notices()
        self.stored: list[_Stored] = []

    @classmethod
    def make_plan(cls, model: nn.Module, method: KPrune, request: Request) -> tuple[RemovalPlan, list[Batch]]:
        encoder = encoder_to_cut(model)
        _refuse_choice_of_linears(method, request)
        batches = batches_for(model, method, request.calibration, request.batch_size)
        _check_samples(batches)
        costs = Costs.of(encoder, batches, method.budget)
        return RemovalPlan(encoder, costs, _remaining(encoder, costs, method.remove)), batches

    @classmethod
    def described(cls, request: Request) -> dict[str, object]:
        return {}

    def run(self) -> None:
        report, before = self.context.report, self._sizes()
        cuts = self._decide_all()
        _apply(self.encoder, cuts)
        after = self._sizes()
        report.flops, report.parameters = (before[0], after[0]), (before[1], after[1])
        report.model_parameters = before[2], after[2]

    def _decide_all(self) -> list[Cut]:
        cuts: list[Cut] = []
        clock = self.context.clock
        with self.encoder.opened(self.context.batches[0].inputs) as self.chain:
            with clock.phase("capture"):
                self._capture()
            for index, sublayer in enumerate(self.sublayers):
                restored = self._restore(index)
                begin = clock.now()
                cut = restored[0] if restored else self._decide(index)
                with clock.phase("forward"):
                    error = self._advance(sublayer, cut)
                if restored:
                    layer = restored[1]
                    self.context.report.resumed_blocks += 1
                else:
                    seconds = clock.now() - begin
                    layer = SubLayerReport(sublayer.name, sublayer.kind, sublayer.units, len(cut.kept), error, seconds)
                    self._save(index, cut, layer)
                self.remaining -= len(cut.kept) * self.costs.unit(sublayer)
                self.context.record([layer])
                cuts.append(cut)
        return cuts

    def _capture(self) -> None:
        generator = torch.Generator().manual_seed(self.context.seed)
        for index, batch in enumerate(self.context.batches):
            output = self.chain.run(batch.inputs)
            if not index:
                self.objective = Objective.choose(self.method.objective, self.method.temperature, output, self.encoder.model.config)
            answers = self.objective.answers(output, batch)
            probes = self.objective.probes(answers, batch, generator)
            embedded = self.chain.embedded
            assert embedded is not None  # the run has set it
            self.stored.append(_Stored(batch, self.chain.attention_mask, answers, probes, embedded, embedded))

    def _sizes(self) -> tuple[float, int, int]:
        """Return the FLOPs and the parameters of the heads and neurons, and the parameters of the model."""
        costs = (Costs.of(self.encoder, self.context.batches, budget) for budget in ("flops", "parameters"))
        flops, parameters = (cost.total(self.encoder) for cost in costs)
        return flops, int(parameters), parameters_of(self.context.model)

    def _decide(self, index: int) -> Cut:
        sublayer = self.sublayers[index]
        with self.context.clock.phase("score"):
            scores = self._scores(index)
        with self.context.clock.phase("search"):
            costs = [self.costs.unit(above) for above in self.sublayers[index:]]
            keep = search(scores, costs, self.remaining)[0]
        kept = keep.nonzero()[:, 0].to(sublayer.out.weight.device)
        cut = Cut(kept, sublayer.out.weight[:, _features_of(sublayer, kept)], sublayer.out.bias)
        if not self.method.tuning:
            return cut
        with self.context.clock.phase("tune"), warnings_about(f"{sublayer.name} {sublayer.kind}"):
            return self._tuned(sublayer, cut)

    def _scores(self, index: int) -> list[torch.Tensor]:
        above = self.sublayers[index:]
        device = above[0].out.weight.device
        predictive = [torch.zeros(sublayer.units, dtype=torch.float64, device=device) for sublayer in above]
        sums = [torch.zeros(sublayer.out.in_features, dtype=torch.float32, device=device) for sublayer in above]
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
            rep = ops.head_neuron_scores(energy, sublayer.out.weight, sublayer.head_size) / self.context.report.calibration_tokens
            scores.append(self.method.scores(pred / samples, rep, self.costs.unit(sublayer), sublayer.kind == "heads"))
        return scores

    def _gradients(self, index: int, stored: _Stored) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Return the features of all sub-layers from `index` on, and the objective's gradients with respect to them."""
        found: list[torch.Tensor] = []

        def visit(place: int, features: torch.Tensor) -> torch.Tensor:
            if place == index:  # the sub-layers below are not differentiated
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
        self.notices.few_tokens(f"{sublayer.name} {sublayer.kind}", self.context.report.calibration_tokens, cut.weight.shape[1])
        gram = torch.zeros(size, size, dtype=torch.float32, device=cut.weight.device)
        cross = torch.zeros(len(cut.weight), size, dtype=torch.float32, device=cut.weight.device)
        for stored in self.stored:
            features = self._kept_features(sublayer, stored, cut.kept)
            missing = self._target(sublayer, stored) - stored.student - F.linear(features, cut.weight, cut.bias)
            rows, row_mask = stored.batch.flatten(F.pad(features.float(), (0, extra), value=1.0))
            ops.gram_(gram, rows, row_mask=row_mask)
            ops.cross_gram_(cross, stored.batch.flatten(missing.float())[0], rows, row_mask=row_mask)
        return Cut(cut.kept, *tuned_projection(cut.weight, cut.bias, gram, cross, self.method.ridge))

    def _advance(self, sublayer: SubLayer, cut: Cut) -> float:
        """Move student and teacher behind the sub-layer. Return their relative squared distance before the LayerNorm."""
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
        if self.context.checkpoint:
            with self.context.clock.phase("write"):
                tensors = {"kept": cut.kept, "weight": cut.weight, "bias": cut.bias}
                self.context.checkpoint.save(index, BlockResult(tensors, [layer]))

    def _restore(self, index: int) -> tuple[Cut, SubLayerReport] | None:
        checkpoint = self.context.checkpoint
        found = checkpoint.read(index, SubLayerReport.from_dict) if checkpoint else None
        if checkpoint is None or found is None:
            return None
        tensors, layers = found
        sublayer = self.sublayers[index]
        if len(layers) != 1 or not _is_cut_of(sublayer, tensors, layers[0]):
            raise checkpoint.damaged(index, f"it is not a cut of the {sublayer.kind} of {sublayer.name}")
        device = sublayer.out.weight.device
        return Cut(*(tensors[name].to(device) for name in ("kept", "weight", "bias"))), layers[0]


def _is_cut_of(sublayer: SubLayer, tensors: Mapping[str, torch.Tensor], layer: SubLayerReport) -> bool:
    """Return whether the tensors of a checkpoint are a `Cut` of this sub-layer that agrees with its report."""
    if tensors.keys() != {"kept", "weight", "bias"}:
        return False
    out, kept = sublayer.out, tensors["kept"]
    if kept.dtype != torch.int64 or kept.dim() != 1:
        return False
    if (layer.name, layer.kind, layer.units, layer.kept) != (sublayer.name, sublayer.kind, sublayer.units, len(kept)):
        return False
    if not torch.equal(kept, kept.unique()) or any(not 0 <= unit < sublayer.units for unit in kept.tolist()):
        return False
    shapes = {"weight": (out.out_features, len(kept) * sublayer.head_size), "bias": (out.out_features,)}
    return all(tensors[n].shape == shape and tensors[n].dtype == getattr(out, n).dtype for n, shape in shapes.items())


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
    if remaining < dearest:  # otherwise the unit of the highest score might not fit
        most = 1 - dearest / total
        raise ValueError(f"KPrune.remove: a share of {share:g} leaves nothing of this model, expected at most {most:.6g}")
    return remaining


def _refuse_choice_of_linears(method: KPrune, request: Request) -> None:
    kind = type(method).__name__
    if request.pattern is not None:
        raise ValueError(f"pattern: expected None, {kind} removes the share {kind}.remove; got {str(request.pattern)!r}")
    if request.format != "dense":
        raise ValueError(f"format: expected 'dense', {kind} leaves no zeros to pack; got {request.format!r}")
    for argument in ("include", "exclude", "patterns"):
        if value := getattr(request, argument):
            raise ValueError(f"{argument}: expected none, {kind} chooses among all heads and neurons; got {value!r}")
    if request.report_error:
        raise ValueError(f"report_error: {kind} always reports the error of each sub-layer; expected False, got True")
