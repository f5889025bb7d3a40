"""The loop that removes experts: each block runs dense once while its experts are scored, and the model is cut at the end.

As in the paper, the scores of every layer are those of the dense model: no expert is removed before all layers are scored. So a run that
fails leaves the model unchanged. A second method may then prune the smaller model, in the same run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ...methods import ExpertMethod, ExpertSums, LinearMethod
from ...models import Blocks, find_blocks, find_linears
from ...models.experts import Experts, ExpertsCall, watched
from ...models.listed_experts import ListedExperts
from ...models.mixtures import Cut, Mixture, find_mixtures, plan_cut
from ...models.source import source_of
from ...models.streaming import in_memory, lent_blocks, stream_of
from ...reports import ExpertReport, MixtureReport, Report
from ...runtime import is_packed
from ..batches import Batch
from ..blockwise.activations import Activations
from ..blockwise.course import Course
from ..blockwise.loop import BlockLoop
from ..blockwise.observation import course_of
from ..blockwise.shares import Share
from ..blockwise.trace import forward
from ..checkpoint import Checkpoint, StreamedCheckpoint
from ..plan import Request, check_device
from ..progress import Notices
from ..run import BlockResult, Loop, RunContext, running
from ..session import batches_for, check_format_fits, parameters_of, prepared
from ..shared_blocks import SharedBlocks
from .listed_calls import ListedCall, watched_lists
from .plan import ExpertPlan
from .scores import ExpertScores

EXPERT = re.compile(r"(^|[._])experts?[._]")  # in names of tensors


class ExpertLoop(Loop[ExpertPlan, ExpertMethod, ExpertReport, Checkpoint | SharedBlocks]):
    """The loop of `ExpertMethod`."""

    REPORT = ExpertReport
    share: Share  # of the batches, set where experts are scored

    def __init__(self, context: RunContext[ExpertPlan, ExpertMethod, ExpertReport, Checkpoint | SharedBlocks]) -> None:
        super().__init__(context)
        self.notices = Notices()
        self.kept: dict[str, torch.Tensor] = {}

    @classmethod
    def make_plan(cls, model: nn.Module, method: ExpertMethod, request: Request) -> tuple[ExpertPlan, list[Batch]]:
        if request.then is None:
            _refuse_choice_of_linears(method, request)
        elif not isinstance(request.then, LinearMethod):
            raise ValueError(f"then: expected a method that makes weights zero, such as 'sparsegpt', got {request.then.name!r}")
        if is_packed(model):
            raise ValueError("model: its linears are packed; sparsekern.unpack(model) makes them dense again")
        check_device(model)
        mixtures = find_mixtures(model)
        blocks = find_blocks(model)
        by_block = tuple(
            tuple(mixture for mixture in mixtures if f"{mixture.experts.name}.".startswith(f"{blocks.block_name(index)}."))
            for index in range(len(blocks.modules))
        )
        if outside := set(mixtures).difference(*by_block):
            names = sorted(mixture.experts.name for mixture in outside)
            raise ValueError(f"model: {names[0]} is in none of the blocks of {blocks.name}, so its experts cannot be scored")
        if request.saves:
            _refuse_carried_experts(model)
        cut = plan_cut(model, mixtures, method.left(mixtures[0].experts.count, mixtures[0].groups))
        batches = batches_for(model, method, request.calibration, request.batch_size)
        with prepared(model, request.seed), lent_blocks(model):
            _check_routing(model, cut, batches[0], type(method).__name__)
            # The batches are those of both methods; an iterator could not be read twice.
            request = replace(request, calibration=[batch.inputs for batch in batches])
            plan = ExpertPlan(_course(model, blocks, by_block, batches), by_block, cut, request)
            with cut.rehearsed():
                _check_forward(model, batches[0])
                if isinstance(request.then, LinearMethod):
                    plan = replace(plan, then=BlockLoop.make_plan(model, request.then, request)[0])
                elif request.saves:
                    check_format_fits(model, {}, request.format)
        return plan, batches

    @classmethod
    def described(cls, request: Request) -> dict[str, object]:
        return {} if request.then is None else super().described(request)

    def run(self) -> None:
        report, model = self.context.report, self.context.model
        before = parameters_of(model)
        self._score_all()
        report.experts = self.plan.cut.mixtures[0].experts.count, self.plan.cut.left
        self.plan.cut.apply(self.kept)
        report.model_parameters = before, parameters_of(model)
        if isinstance(self.plan.request.then, LinearMethod):
            report.then = self._prune_what_is_left(self.plan.request.then)

    def _score_all(self) -> None:
        context, plan = self.context, self.plan
        planned = [index for index in plan.course.order if plan.mixtures[index]]
        held = {index for index in planned if context.checkpoint and context.checkpoint.holds(index)}
        activations = None
        if len(held) < len(planned):
            with context.clock.phase("capture"):
                self.share = Share(context.world, context.batches, context.leaves)
                shelf = context.memory.shelf(context.model)
                activations = Activations(context.model, self.share.batches, plan.course, shelf)
        for index in plan.course.order:
            if index in held:
                self._restore(index)
            if activations is not None:
                with in_memory(context.model, index):
                    if index in planned and index not in held:
                        self._score(index, activations)
                    elif index != planned[-1]:
                        with context.clock.phase("score"):
                            activations.advance(index, context.world.check)
            if index == planned[-1]:
                break

    def _score(self, index: int, activations: Activations) -> None:
        """Score the experts of a block, which runs once meanwhile."""
        begin = self.context.clock.now()
        course, found = self.plan.course, [mixture.experts for mixture in self.plan.mixtures[index]]
        batches = [batch for batch in self.share.batches if index in course.traces[batch.given].order]
        masks = {experts.name: course.masks(experts.name, index)[0] for experts in found}
        scores = ExpertScores(found, self.share, batches, masks)
        with self.context.clock.phase("score"), _all_watched(found, scores.visit):
            activations.advance(index, self.context.world.check)
        scores.check_complete()
        with self.context.clock.phase("exchange" if self.context.world.size > 1 else "score"):
            sums = scores.result()
        seconds = (self.context.clock.now() - begin) / len(found)
        layers = [self._chosen(mixture, sums[mixture.experts.name], seconds) for mixture in self.plan.mixtures[index]]
        if self.context.checkpoint:
            with self.context.clock.phase("write"):
                self.context.checkpoint.save(index, BlockResult(_tensors(sums), layers))
        self.context.record(layers)

    def _restore(self, index: int) -> None:
        checkpoint = self.context.checkpoint
        assert checkpoint is not None  # it holds the block
        found = checkpoint.read(index, MixtureReport.from_dict)
        assert found is not None
        tensors, layers = found
        mixtures = self.plan.mixtures[index]
        expected = _tensors(
            {mixture.experts.name: ExpertSums.zeros(mixture.experts.count, torch.device("cpu")) for mixture in mixtures}
        )
        specs = [{name: (t.shape, t.dtype) for name, t in those.items()} for those in (tensors, expected)]
        if specs[0] != specs[1] or [layer.name for layer in layers] != [mixture.experts.name for mixture in mixtures]:
            raise checkpoint.damaged(index, "it holds other experts than the model's")
        for mixture, layer in zip(mixtures, layers, strict=True):
            name = mixture.experts.name
            sums = ExpertSums(**{key: tensors[f"{name}.{key}"] for key in asdict(ExpertSums.zeros(1, torch.device("cpu")))})
            if self._chosen(mixture, sums, layer.seconds) != layer:
                raise checkpoint.damaged(index, f"its sums are not those of the report of {name}")
        self.context.report.resumed_blocks += 1
        self.context.record(layers)

    def _chosen(self, mixture: Mixture, sums: ExpertSums, seconds: float) -> MixtureReport:
        """Choose the experts of a mixture that stay, and return its report."""
        name, experts = mixture.experts.name, mixture.experts.count
        scores = self.method.scores(sums)
        reached = torch.where(sums.tokens > 0, scores, scores.new_full((), -1.0))  # those without a token go first
        kept = self.method.kept(reached, self.plan.cut.left, mixture.groups)
        self.kept[name] = kept
        removed = sorted(set(range(experts)) - set(kept.tolist()))
        if unseen := int((sums.tokens[kept] == 0).sum()):
            self.notices.once(
                "unseen", f"{name}: no calibration token reached {unseen} of the experts that stay; calibrate with more text"
            )
        return MixtureReport(name, scores.tolist(), sums.tokens.tolist(), removed, seconds)

    def _checkpoint_of_then(self) -> Checkpoint | SharedBlocks | None:
        if self.context.checkpoint is None:
            return None
        checkpoint, stream = self.context.checkpoint.for_stage("then"), stream_of(self.context.model)
        if stream is None or isinstance(checkpoint, SharedBlocks):
            return checkpoint
        return StreamedCheckpoint(checkpoint, self.context.model, stream, self.plan.request.format)

    def _prune_what_is_left(self, then: LinearMethod) -> Report:
        """Prune the smaller model by the method that follows, and return its report."""
        context, request = self.context, self.plan.request
        plan, batches = BlockLoop.make_plan(context.model, then, request)
        plan = BlockLoop.finished_plan(context.model, plan, batches, request)
        settings = {**BlockLoop.described(request), "method": then.settings(), "seed": context.seed, **plan.settings}
        tokens, checkpoint = sum(batch.tokens for batch in batches or ()), self._checkpoint_of_then()
        report = Report(
            settings=settings,
            versions=context.report.versions,
            model_parameters=parameters_of(context.model),
            calibration_tokens=tokens,
        )
        options: dict[str, Any] = {
            "seed": context.seed,
            "checkpoint": checkpoint,
            "report": report,
            "progress": context.progress.enabled,
            "world": context.world,
            "leaves": context.leaves,
            "memory": context.memory,
        }
        with running(context.model, plan, then, batches, **options) as inner:
            BlockLoop(inner).run()
        if isinstance(checkpoint, SharedBlocks):
            checkpoint.follow()
        report.seconds = inner.clock.seconds
        return report


def _course(model: nn.Module, blocks: Blocks, mixtures: tuple[tuple[Mixture, ...], ...], batches: list[Batch]) -> Course:
    """Return the course of the forwards through the blocks with mixtures.

    Raises:
        ValueError: a forward does what cannot be followed, or no batch runs a block with a mixture.
    """
    linears = []
    for index, found in enumerate(mixtures):
        names = tuple(f"{mixture.experts.name}." for mixture in found)
        inside = find_linears(blocks.modules[index], blocks.block_name(index)) if found else []
        linears.append([linear for linear in inside if linear.name.startswith(names)])
    course = course_of(model, blocks, batches, linears)
    for index, found in enumerate(mixtures):
        if found and index not in course.order:
            raise ValueError(
                f"calibration: expected batches that run {blocks.block_name(index)}, which holds {found[0].experts.name}"
            )
    return course


def _few(batch: Batch) -> dict[str, Any]:
    """Return the inputs of one sample, or of the batch where it cannot be divided."""
    return batch.first_sample_alone() or batch.inputs


def _tensors(sums: dict[str, ExpertSums]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, found in sums.items() for key, value in vars(found).items()}


def _check_routing(model: nn.Module, cut: Cut, batch: Batch, kind: str) -> None:
    """Raise `ValueError` if a token needs more experts than are left.

    The number of experts of a token is seen in a forward of a few tokens.
    """
    chosen: dict[str, int] = {}

    def visit(experts: Experts | ListedExperts, call: ExpertsCall | ListedCall) -> None:
        chosen[experts.name] = _most(experts, call)

    with _all_watched([mixture.experts for mixture in cut.mixtures], visit):
        forward(model, _few(batch))
    for mixture in cut.mixtures:
        top_k, in_group = chosen.get(mixture.experts.name, 1), cut.left // mixture.groups
        reachable = min(cut.left, in_group * mixture.chosen_groups) + mixture.further
        if top_k > reachable or (mixture.groups > 1 and in_group < 2):  # routers add the two best scores of each group
            of_groups = f" in {mixture.chosen_groups} of {mixture.groups} groups of {in_group}" if mixture.groups > 1 else ""
            raise ValueError(
                f"{kind}.remove: expected to leave at least {top_k} experts to choose from, the number a token is routed to in "
                f"{mixture.experts.name}, got {reachable}{of_groups}"
            )


@contextmanager
def _all_watched(
    found: Iterable[Experts | ListedExperts], visit: Callable[[Experts | ListedExperts, ExpertsCall | ListedCall], object]
) -> Iterator[None]:
    """Call `visit` with every call of these experts within."""
    found = list(found)
    fused = [experts for experts in found if isinstance(experts, Experts)]
    listed = [experts for experts in found if isinstance(experts, ListedExperts)]
    with watched(fused, visit), watched_lists(listed, visit):
        yield


def _most(experts: Experts | ListedExperts, call: ExpertsCall | ListedCall) -> int:
    """Return how many experts, or what else its router chooses, a token of a call is routed to at most."""
    if isinstance(call, ListedCall):
        return int(torch.bincount(torch.cat(call.rows), minlength=1).max())
    valid = ((call.index >= 0) & (call.index < experts.count + experts.further)).sum(1)
    by_token = valid.new_zeros(call.tokens)
    by_token.index_add_(0, torch.arange(len(valid), device=valid.device) % call.tokens, valid)
    return int(by_token.max())


def _check_forward(model: nn.Module, batch: Batch) -> None:
    """Raise `ValueError` unless a model with fewer experts runs."""
    try:
        forward(model, _few(batch))
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"model: {type(model).__name__} does not run with fewer experts: {error}") from error


def _refuse_carried_experts(model: nn.Module) -> None:
    """Raise `ValueError` if experts that the model's class does not know would be saved unchanged."""
    source = source_of(model)
    for name in source.tensors if source else ():
        if EXPERT.search(name):
            raise ValueError(
                f"model: {source.name if source else ''} holds {name}, which {type(model).__name__} does not know; its number "
                "of experts would no longer agree with the config. Load the model by from_pretrained of transformers to save it without them"
            )


def _refuse_choice_of_linears(method: ExpertMethod, request: Request) -> None:
    kind = type(method).__name__
    if request.pattern is not None:
        raise ValueError(f"pattern: expected None unless then is given, since {kind} removes experts; got {str(request.pattern)!r}")
    for argument in ("include", "exclude", "patterns", "report_error"):
        if value := getattr(request, argument):
            raise ValueError(
                f"{argument}: expected none unless then is given, since {kind} chooses among all experts; got {value!r}"
            )
