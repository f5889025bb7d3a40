"""`prune`: a model's linears, one block at a time.

For each block: run it dense up to the inputs of its last linear and gather statistics; solve its linears; run it pruned to make the
inputs of the next block. Nothing else of the model is run, and nothing that is run is thrown away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..backends.libraries import check_isa
from ..methods import Method, Solution, resolve_method
from ..methods.base import FeedForwardMethod, StatisticKind
from ..models import FeedForward, Linear
from ..pattern import Pattern, parse_pattern
from ..runtime import weight_bytes
from ..runtime.save import DENSE, check_format
from .activations import OUTSIDE, Activations, probe
from .calibration import Batch, Calibration
from .calibration import fingerprint as calibration_fingerprint
from .checkpoint import Checkpoint, finish, model_fingerprint
from .feed_forward import FeedForwardRun, networks_of
from .gradual import GradualRun, check_trainable
from .host_memory import freed_memory_kept
from .plan import Globs, PatternLike, Plan, make_plan
from .preparation import batches_for, check_format_fits, check_saveable, check_seed, environment, prepared, save_model
from .progress import Clock, Notices, Progress, warnings_named
from .report import LayerReport, Report
from .seeds import seeded
from .statistics import FeatureNorm, Gram, Sensitivity, SharedStatistics
from .units import prune_units


def prune(
    model: nn.Module,
    method: str | Method = "sparsegpt",
    pattern: PatternLike = "2:4",
    calibration: Calibration | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    *,
    include: Globs = None,
    exclude: Globs = None,
    patterns: Mapping[str, PatternLike | None] | None = None,
    batch_size: int | None = None,
    report_error: bool = False,
    format: str = DENSE,
    complete: Callable[[Report], None] | None = None,
) -> Report:
    """Prune the linears of a transformers decoder in place, and say what was done.

    Blocks and linears are found by looking at the model, not by its name. Embeddings and `lm_head` stay as they are unless they are
    asked for. Tied weights stay tied, and every mode and hook of the model is put back.

    Args:
        model: a transformers `PreTrainedModel` (or any module called the same way) on one device, in float32, bfloat16 or float16.
        method: `"magnitude"`, `"random"`, `"structured"`, `"wanda"`, `"sparsegpt"`, `"alps"`,
            `"sparsellm"`, `"copal"`, `"gradual"`, `"kprune"` (encoders), or a config such as `SparseGPT(damping=0.01)`.
        pattern: `"N:M"` keeps N of every M consecutive inputs; a float is the share of zeros; or a pattern object.
            For `KPrune`, which prunes encoders, it is the share of FLOPs (or parameters) to remove with whole heads and neurons.
        calibration: token ids, LongTensor `[samples, length]`, or an iterable of batches: LongTensors, or mappings with `input_ids`
            and `attention_mask` (padding is left out of every statistic). Magnitude needs none.
        seed: for whatever draws random numbers on the way; the same seed gives the same result. The global generator is left alone.
        out: a new or empty folder. Each finished block is kept there until, at the end, the pruned model, `report.json` and
            `report.html` are saved to it.
        resume: go on with the unfinished run in `out`; `model` is the dense model again. The result is the same, bit for bit.
        progress: show a progress bar.
        include: names or globs of linears to prune, such as `"*.mlp.*"`; all linears of the blocks where it is None. A linear outside
            the blocks is pruned only where its whole name is given, as in `include=["*", "lm_head"]`.
        exclude: names or globs of linears to leave as they are.
        patterns: glob -> pattern, or None to leave dense; the first match wins over `pattern`.
        batch_size: samples run at once where `calibration` is one tensor; None chooses. A matter of speed and memory only.
        report_error: take a Gram matrix just to report each layer's error also for methods that do without one (Wanda, magnitude).
            It costs about as much as the forwards. SparseGPT and ALPS always report it, KPrune that of its sub-layers.
        format: of what is saved to `out`, as for `sparsekern.save`: `"dense"`, `"packed"`, `"bitmask"` or `"N:M"`. `model` itself
            stays dense. One that the patterns are not sure to fit, such as `"2:4"` where they are shares of zeros, is refused.
        complete: called with the report once model and report are in `out`, while the checkpoint is still there: puts whatever else
            belongs in the folder. A run killed meanwhile can be resumed, and then needs only to do this again.

    Returns:
        A `Report`: each layer's pattern, sparsity, error and seconds. `print` it or write it with `to_json`.

    Raises:
        ValueError, TypeError: bad arguments, and a model that cannot be pruned so, before any work is done; NaN or Inf in an
            activation, naming the linear and the calibration sample. The block at hand is then unchanged, earlier ones are pruned
            (and on disk with `out`). Training (`Gradual`) whose loss or weights do not stay finite leaves the model changed.
        OSError: no space left in `out`; the blocks finished before are intact.
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}; sparsekern.load makes one of a name")
    method = resolve_method(method)
    check_seed(seed)
    check_isa()
    check_format(format)
    if method.removes_units:
        _refuse_choice_of_linears(method, format, include, exclude, patterns)
        if report_error:
            raise ValueError(
                f"report_error: {type(method).__name__} always reports the error of each sub-layer; expected False, got {report_error!r}"
            )
        options = {"seed": seed, "out": out, "resume": resume, "progress": progress, "batch_size": batch_size, "complete": complete}
        return prune_units(model, method, pattern, calibration, **options)
    plan = make_plan(model, pattern, patterns, include, exclude)
    if out is not None:
        check_saveable(model)
        check_format_fits(model, plan.patterns, format)
    plan = replace(plan, patterns=method.arrange(model, plan.parts, plan.patterns))
    kind = "gram" if report_error else method.statistic
    batches = batches_for(model, method, calibration, batch_size) if kind or method.trains else None
    if report_error and method.whole_model:
        raise ValueError(f"report_error: {type(method).__name__} has no errors of layers to report")
    if method.trains:
        with prepared(model, seed):
            check_trainable(model, batches)
    networks = None
    if isinstance(method, FeedForwardMethod):
        with prepared(model, seed):
            networks = networks_of(model, plan, batches[0], method)
    settings = {
        "method": method.settings(),
        "patterns": {name: str(value) for name, value in plan.patterns.items()},
        "seed": seed,
        "report_error": report_error,
        "calibration": batches and calibration_fingerprint(batches),
    }
    checkpoint = None
    if out is not None:
        settings["model"] = model_fingerprint(model)
        checkpoint = Checkpoint(out, settings, environment(model), resume=resume)
    elif resume:
        raise ValueError("resume: expected out, the folder of the run to go on with")
    report = Report(
        settings={**settings, "pattern": str(parse_pattern(pattern)), "versions": environment(model)},
        calibration_tokens=sum(batch.tokens for batch in batches or ()),
    )
    bar = Progress(len(plan.linears), progress)
    clock = Clock(next(model.parameters()).device)
    try:
        with prepared(model, seed), freed_memory_kept():
            if method.whole_model:
                GradualRun(model, plan, method, batches, checkpoint, report, bar, clock).prune_all()
            else:
                BlockRun(model, plan, networks, method, kind, batches, checkpoint, report, bar, clock).prune_all()
        if out is not None:
            with clock.phase("write"):
                save_model(model, out, format)
    finally:
        bar.close()
    report.seconds = {**clock.seconds, "total": time.perf_counter() - start}
    if out is not None:
        finish(out, report, weight_bytes(model), complete)
    return report


class BlockRun:
    """One call of `prune`, everything being checked."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        networks: list[FeedForward | None] | None,
        method: Method,
        kind: StatisticKind | None,
        batches: list[Batch] | None,
        checkpoint: Checkpoint | None,
        report: Report,
        bar: Progress,
        clock: Clock,
    ) -> None:
        self.model, self.plan, self.networks = model, plan, networks
        self.method, self.kind, self.batches = method, kind, batches
        self.checkpoint, self.report, self.bar, self.clock = checkpoint, report, bar, clock
        self.notices, self.seed = Notices(), torch.initial_seed()

    def prune_all(self) -> None:
        blocks, outside = self.plan.blocks, self.plan.outside_linears
        parts = (*self.plan.block_linears, outside)
        planned = [index for index, linears in enumerate(parts) if linears]
        batches = self.batches
        if self.checkpoint and all(map(self.checkpoint.holds, planned)):
            batches = None  # nothing is left to solve, so no hidden states are needed
        if batches:
            with self.clock.phase("capture"):
                self.probe = probe(self.model, blocks, self.plan.linears, batches[0], to_the_end=bool(outside))
                self.activations = Activations(self.model, blocks, batches, self.probe.returns_tuple)
        resuming = True
        for index, linears in enumerate(parts):
            if linears:
                resuming = resuming and self._restore(index, linears)
                if not resuming:
                    self._prune_block(index, linears)
            if batches and index < planned[-1]:
                with self.clock.phase("forward"):
                    self.activations.advance(index)

    def _restore(self, index: int, linears: Sequence[Linear]) -> bool:
        found = self.checkpoint.load(index, linears) if self.checkpoint else None
        if found is None:
            return False
        weights, layers = found
        self._write(linears, weights)
        self.report.resumed_blocks += 1
        self._record(layers)
        return True

    def _prune_block(self, index: int, linears: Sequence[Linear]) -> None:
        network = self.networks[index] if self.networks and index < len(self.networks) else None
        together = network.linears if network else ()
        alone = [linear for linear in linears if linear not in together]
        weights: dict[str, torch.Tensor] = {}
        layers: dict[str, LayerReport] = {}
        if network is None or self.method.attention == "dense":
            run = self._start_run(network)
            shared = self._gather(index, linears, run) if self.kind else None
            self._solve_alone(alone, shared, weights, layers)
        else:
            if alone:
                self._solve_alone(alone, self._gather(index, alone), weights, layers)
            with self._written_meanwhile(alone, weights):
                run = self._start_run(network)
                shared = self._gather(index, together, run)
        if run is not None:
            self._solve_together(run, shared, weights, layers)
        ordered = [layers[linear.name] for linear in linears]
        if self.checkpoint:
            with self.clock.phase("write"):
                self.checkpoint.save(index, weights, ordered)
        self._write(linears, weights)
        self._record(ordered)

    def _solve_alone(
        self,
        linears: Sequence[Linear],
        shared: SharedStatistics | None,
        weights: dict[str, torch.Tensor],
        layers: dict[str, LayerReport],
    ) -> None:
        groups = shared.groups if shared else [(linears, None)]
        for members, statistic in groups:
            for linear in members:
                if linear in linears:
                    with self.clock.phase("solve"):
                        statistics = shared.of(linear, statistic) if shared else None
                        weights[linear.name], layers[linear.name] = self._solve(linear, statistics)

    def _start_run(self, network: FeedForward | None) -> FeedForwardRun | None:
        return None if network is None else FeedForwardRun(network, self.plan, sum(batch.tokens for batch in self.batches))

    def _solve_together(
        self, run: FeedForwardRun, shared: SharedStatistics, weights: dict[str, torch.Tensor], layers: dict[str, LayerReport]
    ) -> None:
        linears = run.network.linears
        statistics = {linear.name: statistic for members, statistic in shared.groups for linear in members}
        start = self.clock.now()
        with self.clock.phase("solve"):
            try:
                with warnings_named(run.network.down.name), seeded(self.seed, run.network.down.name):
                    solved, solution = run.solve(self.method, statistics)
            except ValueError as error:
                raise ValueError(f"{', '.join(linear.name for linear in linears)}: {error}") from error
        weights |= solved
        seconds = (self.clock.now() - start) / len(linears)
        for linear in linears:
            found = Solution(solved[linear.name], solved[linear.name] != 0)
            zeros, error = _outcome(linear.weight, found, statistics[linear.name])
            whole = (solution.error, solution.alone) if linear is run.network.down else ()
            pattern, shape = str(self.plan.patterns[linear.name]), tuple(linear.weight.shape)
            layers[linear.name] = LayerReport(linear.name, pattern, shape, zeros, error, seconds, *whole)

    @contextmanager
    def _written_meanwhile(self, linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The block with new weights for `linears`; as it was afterwards, so that a failure leaves it unchanged."""
        dense = {linear.name: linear.weight.clone() for linear in linears}
        self._write(linears, weights)
        try:
            yield
        finally:
            self._write(linears, dense)

    def _gather(self, index: int, linears: Sequence[Linear], run: FeedForwardRun | None = None) -> SharedStatistics:
        shared = SharedStatistics(linears, self.kind, self.method.sensitivity)
        names = {linear.name for linear in linears}
        if index < len(self.plan.blocks.modules):
            order = self.probe.calls[self.plan.blocks.block_name(index)]
            batches = self.activations.inputs_of(index, linears, [name for name in order if name in names])
        else:
            batches = self.activations.inputs_outside(linears, self.probe.calls[OUTSIDE])
        while True:
            with self.clock.phase("forward"):
                step = next(batches, None)
            if step is None:
                break
            with self.clock.phase("statistics"):
                shared.add(*step)
                if run is not None:
                    run.add(step[0], step[1][run.network.up.name])
        for members, statistic in shared.groups:
            self._check_statistic(members, statistic)
        return shared

    def _check_statistic(self, members: Sequence[Linear], statistic: FeatureNorm | Gram) -> None:
        name, features = members[0].name, members[0].features
        if not statistic.tokens:
            raise ValueError(f"{name}: no calibration token reached it; calibrate with more text or leave it out with exclude")
        if self.method.statistic == "gram":
            self.notices.few_tokens(name, statistic.tokens, features)
        if dead := int((statistic.sum_squares == 0).sum()):
            self.notices.once(
                "dead features",
                f"{name}: {dead} of {features} input features were never active in calibration; their weights are pruned first",
            )

    def _solve(self, linear: Linear, statistic: FeatureNorm | Gram | Sensitivity | None) -> tuple[torch.Tensor, LayerReport]:
        start = self.clock.now()
        weight, pattern = linear.weight, self.plan.patterns[linear.name]
        try:
            with warnings_named(linear.name), seeded(self.seed, linear.name):
                solution = self._solution(linear, statistic, pattern)
        except ValueError as error:
            raise ValueError(f"{linear.name}: {error}") from error
        zeros, error = _outcome(weight, solution, statistic)
        seconds = self.clock.now() - start
        return solution.weight, LayerReport(linear.name, str(pattern), tuple(weight.shape), zeros, error, seconds)

    def _solution(self, linear: Linear, statistic: FeatureNorm | Gram | Sensitivity | None, pattern: Pattern) -> Solution:
        return self.method.solve(linear.weight, statistic, pattern)

    def _write(self, linears: Sequence[Linear], weights: Mapping[str, torch.Tensor]) -> None:
        for linear in linears:
            linear.weight.copy_(weights[linear.name])

    def _record(self, layers: Sequence[LayerReport]) -> None:
        for layer in layers:
            self.report.layers.append(layer)
            self.bar.layer_done(layer)


def _outcome(
    weight: torch.Tensor, solution: Solution, statistic: FeatureNorm | Gram | Sensitivity | None
) -> tuple[int, float | None]:
    """How many zeros there are, and the relative error where it is known: one read from the device a linear."""
    found = [(solution.weight == 0).sum().double()]
    if isinstance(statistic, Sensitivity):
        statistic = statistic.inputs
    if isinstance(statistic, Gram):
        row_error = solution.row_error
        if row_error is None:
            row_error = statistic.row_energy(solution.weight.float() - weight.float())
        found += [row_error.double().sum(), statistic.row_energy(weight).sum()]
    zeros, *figures = torch.stack(found).tolist()
    if not figures:
        return int(zeros), None
    error, energy = figures
    return int(zeros), error / energy if energy else 0.0


def _refuse_choice_of_linears(method: Method, format: str, include: Globs, exclude: Globs, patterns: Mapping | None) -> None:
    if format != "dense":
        raise ValueError(f"format: expected 'dense', {type(method).__name__} leaves no zeros to pack; got {format!r}")
    for argument, value in (("include", include), ("exclude", exclude), ("patterns", patterns)):
        if value:
            raise ValueError(
                f"{argument}: expected none, {type(method).__name__} chooses among all heads and neurons; got {value!r}"
            )
