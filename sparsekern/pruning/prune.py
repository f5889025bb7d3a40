"""`prune`: check everything, choose the loop of the method, leave a finished folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from ..backends.libraries import check_isa
from ..methods import Method, resolve_method
from ..methods.base import FeedForwardMethod
from ..models.globs import Globs
from ..pattern import parse_pattern
from ..reports.report import Report
from ..runtime import weight_bytes
from ..runtime.save import DENSE, check_format
from .batches import Calibration
from .batches import fingerprint as calibration_fingerprint
from .blockwise.feed_forward import networks_of
from .blockwise.loop import BlockRun
from .checkpoint import Checkpoint, finish, model_fingerprint
from .gradual.loop import GradualRun, check_trainable
from .host_memory import freed_memory_kept
from .plan import PatternLike, make_plan
from .progress import Clock, Progress
from .removal.loop import prune_units
from .session import batches_for, check_format_fits, check_saveable, check_seed, environment, prepared, save_model


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
        settings={**settings, "pattern": str(parse_pattern(pattern))},
        versions=environment(model),
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


def _refuse_choice_of_linears(method: Method, format: str, include: Globs, exclude: Globs, patterns: Mapping | None) -> None:
    if format != "dense":
        raise ValueError(f"format: expected 'dense', {type(method).__name__} leaves no zeros to pack; got {format!r}")
    for argument, value in (("include", include), ("exclude", exclude), ("patterns", patterns)):
        if value:
            raise ValueError(
                f"{argument}: expected none, {type(method).__name__} chooses among all heads and neurons; got {value!r}"
            )
