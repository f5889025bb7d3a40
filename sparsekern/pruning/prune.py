"""The function `prune`: check the arguments, run the loop of the method's class, and write the finished folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from .._warnings import warn
from ..backends.libraries import check_isa
from ..data import CalibrationText, as_calibration
from ..methods import (
    BlockTuning,
    Distill,
    ExpertMethod,
    GradualMethod,
    LinearMethod,
    Method,
    RemovalMethod,
    resolve_method,
    with_values,
)
from ..methods.allocation import MIXED, UNIFORM
from ..models.fingerprint import model_fingerprint
from ..models.limits import predicts_next_tokens
from ..models.memory import room_beside
from ..models.streaming import stream_of
from ..pattern import parse_pattern
from ..ranks import World
from ..reports.report import Report
from ..runtime import weight_bytes
from ..runtime.output import checked_path
from ..runtime.save import DENSE, check_format
from .batches import Batch, Calibration, fingerprint
from .blockwise.loop import BlockLoop
from .checkpoint import Checkpoint
from .corrections import NONE
from .experts.loop import ExpertLoop
from .gradual.loop import GradualLoop
from .memory import planned_memory
from .mixtures import EQUAL, MAGNITUDE, ExpertRules
from .modes import check_modes, plain_modes
from .needs import OPTIONAL, Run, check_settings, without_unmet
from .plan import Choice, PatternLike, Request
from .processes import Traffic, check_same_run, checked_leaves, on_all_ranks, say_idle
from .quality import Preset, with_quality
from .removal.loop import RemovalLoop
from .run import Loop, running
from .saving import DENSE_FITS, RunFolder
from .session import check_module, check_seed, check_streamed, environment, parameters_of
from .shared_blocks import SharedBlocks, follow_written, shared_blocks
from .tuning.checks import check_room
from .tuning.distill import Distillation, batches_to_train_on


@on_all_ranks
def prune(
    model: nn.Module,
    method: str | Method | None = None,
    pattern: PatternLike | None = None,
    calibration: Calibration | None = None,
    *,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    include: Choice = None,
    exclude: Choice = None,
    patterns: Mapping[str, PatternLike | None] | None = None,
    batch_size: int | None = None,
    report_error: bool = False,
    weighting: str = EQUAL,
    unseen: str = MAGNITUDE,
    format: str = DENSE,
    then: str | Method | None = None,
    leaves: int | None = None,
    max_memory: int | str | None = None,
    correction: str = NONE,
    tune: BlockTuning | None = None,
    allocation: str = UNIFORM,
    quality: str | None = None,
    distill: Distill | None = None,
    values: str | None = None,
) -> Report:
    """Prune the linears of a transformers model in place, or remove experts or an encoder's units, and return a report.

    Blocks and linears are found from the structure of the model, not from its name, and how a forward runs them is observed. An encoder
    and its decoder are both pruned; of a language model with towers for images or sound, the language model is. Embeddings and
    `lm_head` stay dense unless they are named. Tied weights stay tied, and every mode and hook of the model is restored.

    Args:
        model: a transformers `PreTrainedModel` (or any module with the same call) on one device, in float32, bfloat16 or float16.
        method: `"magnitude"`, `"random"`, `"structured"`, `"wanda"`, `"sparsegpt"`, `"alps"`, `"sparsellm"`, `"copal"`, `"gradual"`,
            `"kprune"` (encoders), `"experts"` (mixtures), a config such as `SparseGPT(damping=0.01)`, or a config of your own class.
            None is `"sparsegpt"`, or the method of `quality`.
        pattern: `"N:M"` keeps N of every M consecutive inputs. A float is the share of zeros. Pattern objects are taken too. None is
            `"2:4"`. `KPrune` and `ExpertPruning` take only None, since their `remove` is the share to remove.
        calibration: token ids, LongTensor `[samples, length]`, or an iterable of batches: LongTensors, or mappings of whatever the
            model's forward takes, such as `input_ids`, `pixel_values` or `decoder_input_ids`. Padding by `attention_mask` and
            `decoder_attention_mask` is left out of every statistic, and `labels` only give decoder ids. An encoder with a decoder takes
            ids alone on both sides. A model of images or sound takes a tensor of its main input. A text that `sparsekern.data.read_documents` takes is
            given by name, such as `"wiki.txt"`, `"hf:NAME"` or `"builtin:python-docs"`. `"self:200k"` is 200,000 tokens that the dense model
            writes itself, which are kept in a cache. Magnitude needs none.
        tokenizer: the model's tokenizer, to read a text. It is also saved to `out`.
        samples: number of windows of a text (None is 128), or of sentences for `KPrune` (None is 1024).
        length: tokens in a window of a text, and the most tokens of a sentence. None is 2048, or the model's positions if they are
            fewer.
        seed: seed of all random numbers. The same seed gives the same result. Torch's global generator is unchanged.
        out: a new or empty folder, which no other program may write to meanwhile. Each finished block is kept there. At the end it
            holds the pruned model, the tokenizer, a model card, `report.json` and `report.html`, which appear at the same time.
        resume: continue the unfinished run in `out`, if there is one; `model` is the dense model again. The result is the same, bit for
            bit. A finished run is refused, since its folder holds the model and the report.
        progress: show a progress bar.
        include: names or globs of linears to prune, such as `"*.mlp.*"`. None is all linears of the blocks, except towers beside a
            language model. A linear outside the blocks is pruned only if its whole name is given, as in `include=["*", "lm_head"]`. A callable `(name, module) -> bool`
            chooses among the linears of the blocks.
        exclude: names or globs of linears to leave dense, or a callable as for `include`.
        patterns: patterns by glob, where None leaves linears dense. The first match wins over `pattern`.
        batch_size: number of samples that run at once if `calibration` is one tensor; None chooses. It affects only speed and memory.
        report_error: take a Gram matrix only to report each layer's error, for methods that need none, such as Wanda and magnitude.
            It costs about as much as the forwards. SparseGPT and ALPS always report the error, KPrune that of its sub-layers.
        weighting: weight of a token in the statistics of fused experts. `"equal"` counts it once for each expert that it is routed to.
            `"routing"` scales it by its routing weight there, which makes Wanda the score of MoE-Pruner.
        unseen: what happens to linears that no calibration token reached, such as those of an expert: `"magnitude"` prunes them by
            magnitude, `"dense"` leaves them dense, `"error"` stops in front of their block. One warning names them at the end.
        format: format of the weights in `out`, as for `sparsekern.save`: `"dense"`, `"packed"`, `"bitmask"` or `"N:M"`. `model`
            itself stays dense. A format that the patterns are not sure to fit, such as `"2:4"` for shares of zeros, is refused.
        then: with `ExpertPruning`, the method that prunes the experts that stay, and all else, once the others are removed. `pattern`,
            `include`, `exclude`, `patterns` and `report_error` are its arguments then.
        leaves: the number of parts, a power of two, that statistics are summed in before the parts are added in pairs. None is 8 for
            several processes, 1 for one. Results of equal `leaves` have the same bits for any number of processes.
        max_memory: the most memory of the host that the run of a streamed model may take, in bytes or as `"8GB"`. Hidden states that
            do not fit are kept in a file in `out`, which has no name and is gone when the run ends in whatever way. A limit that is too
            low is refused with what it must be.
        correction: what is done about the error of what is pruned already. `"none"` takes the inputs of a whole block while it is
            dense. `"sequential"` takes those of each linear once the linears in front of it are pruned. `"dense"` also corrects the
            target: the linear comes as close as it can to its outputs in the dense model. Of every eight calibration samples one is
            then held out, to choose how far to correct each linear. It takes about three times the forwards, and `"sequential"`
            twice. Experts of a mixture keep their own weights as targets.
        tune: settings of the tuning of each block behind the method, such as `BlockTuning(passes=2)`. None tunes nothing. The dense
            model's hidden states are then kept beside those of the pruned one. A step takes at least one batch, so that a large
            `batch_size` makes steps long.
        allocation: how zeros are shared out among the linears of the blocks whose pattern is a share. `"uniform"` gives each the share
            that is asked for, `"fisher"` each its own, at most 0.15 from that, where the zeros cost least; their number stays the
            same. The cost is the squared error of each output times the mean square of the loss's gradient there. It takes one
            backward pass over 4,096 tokens, and about five times as long as a run of SparseGPT. A streamed model is read three times more.
            Of an expert, errors and gradients are those of the tokens that are routed to it. `"mixed"` is the same, and also gives
            each linear with a pattern N:M an N of its own, such as 3, 4 or 5 for 4:8: it differs by 1, or by up to 0.15 M. The zeros of
            all linears of one M stay.
        quality: a name for method, correction, allocation, tune and distill. `"fast"` is SparseGPT. `"good"` is ALPS with the
            correction `"dense"`. `"best"` is the same with `BlockTuning()` and `Distill()`, and with the allocation `"fisher"` where
            the pattern is a share. It leaves out, with a warning, whichever of allocation, tune and distill the run or the model does
            not allow. A config of the method that it names, `tune`, `distill` and the allocation `"mixed"` may be given besides, and
            replace what it would choose.
        distill: settings of the training of the whole model once it is pruned, such as `Distill(steps=100)`. None trains nothing. The
            dense model's hidden states in front of the head are then kept; a copy of it only where the head is not the end.
        values: `"int4"` rounds what the method keeps to 4 bits, for the formats `"2:4-q4"`, `"1:4-q4"` and `"4:16-q4"`: to -8 to 7 times
            a scale for each row and 64 columns. `tune` and `distill` then train the rounded weights, straight-through. None keeps the
            model's dtype.

    Returns:
        A `Report` of each layer's pattern, sparsity, error and seconds, for `KPrune` a `RemovalReport`, for `ExpertPruning` an
        `ExpertReport`. `print` it, or write it with `to_json`.

    Raises:
        TypeError: bad arguments. They are refused before any work is done.
        MemoryError: the state of `distill` does not fit, before any work is done; or what it keeps of the dense model, before anything
            is pruned.
        ValueError: bad arguments, or a model that cannot be pruned in this way, before any work is done. Also NaN or Inf in an
            activation, which the message locates by linear and calibration sample. Then the current block is unchanged, and the
            earlier ones are pruned (and on disk with `out`). Training (`Gradual`) whose loss or weights do not stay finite leaves
            the model changed.
        FileExistsError: `out` holds a finished run or other files.
        OSError: no space left in `out`, or no right to write to it, before any work is done. Also a disk that fails later, which
            leaves the finished blocks intact.

    Example:
        >>> options = {"tokenizer": tokenizer, "samples": 8, "length": 16, "progress": False}
        >>> report = sparsekern.prune(model, "wanda", "2:4", calibration="text.txt", out="out", **options)
        >>> report.sparsity
        0.5
        >>> pruned = sparsekern.load("out")
    """
    start = time.perf_counter()
    check_module(model)
    pattern = None if pattern is None else parse_pattern(pattern)
    given = Preset(correction=correction, allocation=allocation, tune=tune, distill=distill)
    chosen = with_quality(quality, pattern, method, given)
    method = with_values(resolve_method(chosen.method), values)
    check_seed(seed)
    check_isa()
    check_format(format)
    if then is not None and not isinstance(method, ExpertMethod):
        raise ValueError(f"then: expected None unless method removes experts, got {then!r} after {method.name!r}")
    if resume and out is None:
        raise ValueError("resume: expected out, the folder of the run to continue")
    request = Request(
        pattern=pattern,
        calibration=as_calibration(
            calibration,
            tokenizer=tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            sentences=isinstance(method, RemovalMethod),
            progress=progress and World.current().leads,
        ),
        include=include,
        exclude=exclude,
        patterns=patterns,
        batch_size=batch_size,
        report_error=report_error,
        rules=ExpertRules(weighting, unseen),
        format=format,
        saves=out is not None,
        seed=seed,
        then=None if then is None else resolve_method(then),
        correction=chosen.correction,
        tune=chosen.tune,
    )
    remedy = f"what is pruned is kept in {out}: resume=True (--resume) needs only to save it; {DENSE_FITS}"
    if not isinstance(request.then or method, LinearMethod):
        request.rules.check_unweighted(method)
    options: dict[str, Any] = {"tokenizer": tokenizer, "format": format, "method": method, "resume": resume, "remedy": remedy}
    check_streamed(model, (method, request.then), out)
    room_beside(model, max_memory)
    world = World.current()
    traffic = Traffic(world)
    leaves = checked_leaves(leaves, world, method)
    run = Run(
        method=request.then or method,
        is_second=then is not None,
        is_streamed=stream_of(model) is not None,
        leaves=leaves,
        predicts=predicts_next_tokens(model),
    )
    left_out: list[str] = []
    if quality is not None:
        check_modes(model)  # what follows looks at weights
        chosen, left_out = without_unmet(chosen, given, run)
        asked = {name for name in OPTIONAL if getattr(given, name) != getattr(Preset(), name)}
        request = replace(request, optional=frozenset(OPTIONAL).difference(asked))
    check_settings({**vars(chosen), "values": values}, run)
    if chosen.allocation == MIXED and ":" in format:
        raise ValueError(f"format: expected 'packed', 'bitmask' or 'dense' for allocation={MIXED!r}, got {format!r}")
    distill = chosen.distill
    request = replace(request, leaves=leaves, allocation=chosen.allocation, distill=distill)
    options |= {"trains": distill is not None, "tunes": 0 if chosen.tune is None else chosen.tune.blocks}
    if distill is not None and not isinstance(request.calibration, CalibrationText):
        for name in ("samples", "own_samples"):
            if (count := getattr(distill, name)) is not None:
                raise ValueError(
                    f"Distill.{name}: expected None unless calibration is a text, got {count} for {type(calibration).__name__}"
                )
    with plain_modes(model) as model, RunFolder.opened(out if world.leads else None, model, **options) as folder:
        loop = loop_of(method)
        place = None if out is None else checked_path(out, "out")  # of all ranks, of which only the first holds the folder
        request = replace(request, max_memory=max_memory, folder=place)
        plan, batches = loop.make_plan(model, method, request)
        if quality is not None:  # its methods prune linear by linear
            left_out, distill = [*left_out, *plan.left_out], plan.distill
        if distill is not None:
            check_room(model, on_grid=values is not None, leaves=leaves // world.size)
        if left_out and world.leads:
            warn(f"quality: {quality!r} leaves out {', and '.join(left_out)}", stacklevel=3)
        memory = planned_memory(model, plan, method, batches or [], max_memory, place, leaves // world.size, ranks=world.size)
        settings: dict[str, Any] = {"method": method.settings(), "seed": seed, **plan.settings}
        settings["calibration"] = batches and fingerprint(batches)
        trained_on: list[Batch] = []
        if distill is not None:
            trained_on = batches_to_train_on(model, cast(LinearMethod, request.then or method), request, distill, batches or [])
            settings["distill"] |= {"calibration": fingerprint(trained_on)} if distill.samples or distill.own_samples else {}
        if batches and leaves > 1:
            settings["leaves"] = leaves
            say_idle(world, batches)
        own: Checkpoint | None = None
        if out is not None or world.size > 1:
            settings["model"] = model_fingerprint(model)
        check_same_run(
            world,
            {**settings, "out": out and str(out), "resume": resume, "format": format, "max_memory": max_memory},
            environment(model),
        )
        plan = loop.finished_plan(model, plan, batches, request)
        settings |= {"patterns": plan.settings["patterns"]} if "patterns" in settings else {}
        if folder is not None:
            own = folder.checkpoint(model, settings, environment(model), resume=resume)
        checkpoint: Checkpoint | SharedBlocks | None = own
        if out is not None and world.size > 1:
            path = checked_path(out, "out")
            writes = not isinstance(method, ExpertMethod)
            checkpoint = shared_blocks(world, own, len(plan.parts), model, path, settings, format, writes=writes)
        report = loop.REPORT(
            settings={**loop.described(request), **settings},
            versions=environment(model),
            calibration_tokens=sum(batch.tokens for batch in batches or ()),
        )
        if isinstance(report, Report):
            report.model_parameters = parameters_of(model)
        dense_bytes = weight_bytes(model)
        shown: dict[str, Any] = {"seed": seed, "checkpoint": checkpoint, "report": report, "progress": progress}
        shown |= {"memory": memory, "world": world, "leaves": leaves}
        with running(model, plan, method, batches, **shown) as context:
            try:
                distillation = None if distill is None else Distillation(cast("Any", context), distill, own, trained_on)
                loop(context).run()
                if distillation is not None:
                    distillation.run()
            except (TypeError, ValueError):
                if checkpoint is not None:
                    checkpoint.drop_unused()
                raise
        clock = context.clock
        if isinstance(checkpoint, SharedBlocks):
            checkpoint.follow()
        traffic.tell(report, clock, sum(map(bool, plan.parts)) - report.resumed_blocks if world.size > 1 else 0)
        parts = None
        if folder is not None:
            parts = folder.write(model, report, dense_bytes=dense_bytes, clock=clock, start=start)
        else:
            report.seconds = {**clock.seconds, "total": time.perf_counter() - start}
        if out is not None:
            follow_written(world, model, checked_path(out, "out"), parts)
        return cast(Report, report)  # a `RemovalReport` for a `RemovalMethod`, which no type can tell from a name


def loop_of(method: Method) -> type[Loop[Any, Any, Any, Any]]:
    """Return the loop for the class of a method."""
    if isinstance(method, LinearMethod):
        return BlockLoop
    if isinstance(method, ExpertMethod):
        return ExpertLoop
    return GradualLoop if isinstance(method, GradualMethod) else RemovalLoop
