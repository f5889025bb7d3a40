"""`prune`: check everything, choose the loop by the method's class, run it, leave a finished folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..backends.libraries import check_isa
from ..data import as_calibration
from ..methods import GradualMethod, LinearMethod, Method, RemovalMethod, resolve_method
from ..pattern import parse_pattern
from ..reports.report import Report
from ..runtime import weight_bytes
from ..runtime.save import DENSE, check_format
from .batches import Calibration, fingerprint
from .blockwise.loop import BlockLoop
from .checkpoint import model_fingerprint
from .gradual.loop import GradualLoop
from .modes import plain_modes
from .plan import Choice, PatternLike, Request
from .removal.loop import RemovalLoop
from .run import Loop, running
from .saving import DENSE_FITS, RunFolder
from .session import check_module, check_seed, environment

LOOPS: dict[type[Method], type[Loop]] = {LinearMethod: BlockLoop, GradualMethod: GradualLoop, RemovalMethod: RemovalLoop}


def prune(
    model: nn.Module,
    method: str | Method = "sparsegpt",
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
    format: str = DENSE,
) -> Report:
    """Prune the linears of a transformers decoder in place, and report what was done.

    Blocks and linears are found from the structure of the model, not from its name. Embeddings and `lm_head` stay dense unless they
    are asked for. Tied weights stay tied, and every mode and hook of the model is put back.

    Args:
        model: a transformers `PreTrainedModel` (or any module called the same way) on one device, in float32, bfloat16 or float16.
        method: `"magnitude"`, `"random"`, `"structured"`, `"wanda"`, `"sparsegpt"`, `"alps"`, `"sparsellm"`, `"copal"`, `"gradual"`,
            `"kprune"` (encoders), a config such as `SparseGPT(damping=0.01)`, or one of your own class.
        pattern: `"N:M"` keeps N of every M consecutive inputs; a float is the share of zeros; or a pattern object. None is `"2:4"`,
            and all that `KPrune` takes, whose `remove` is the share of FLOPs (or parameters) to remove.
        calibration: token ids, LongTensor `[samples, length]`, or an iterable of batches: LongTensors, or mappings with `input_ids`
            and `attention_mask` (padding is left out of every statistic); or a text that `sparsekern.data.read_documents` takes, such
            as `"wiki.txt"`, `"hf:NAME"` or `"builtin:python-docs"`. Magnitude needs none.
        tokenizer: the model's tokenizer, which a text is read with. It is saved to `out` too.
        samples: of a text, how many windows (None is 128), or for `KPrune` how many sentences (None is 1024).
        length: tokens in a window of a text, or beyond which a sentence is cut off. None is 2048, or the model's positions where they are
            fewer.
        seed: seeds all random numbers; the same seed gives the same result. The global generator is left alone.
        out: a new or empty folder, which nobody else may write to meanwhile. Each finished block is kept there. At the end it holds the
            pruned model, the tokenizer, a model card, `report.json` and `report.html`, all at once.
        resume: continue the unfinished run in `out`, if there is one; `model` is the dense model again. The result is the same, bit for
            bit. A run that is finished is refused: its folder holds the model and the report.
        progress: show a progress bar.
        include: names or globs of linears to prune, such as `"*.mlp.*"`; all linears of the blocks where it is None. A linear outside
            the blocks is pruned only where its whole name is given, as in `include=["*", "lm_head"]`. A callable
            `(name, module) -> bool` chooses among the linears of the blocks.
        exclude: names or globs of linears to leave dense, or a callable as for `include`.
        patterns: glob -> pattern, or None to leave dense; the first match wins over `pattern`.
        batch_size: samples run at once where `calibration` is one tensor; None chooses. It affects speed and memory only.
        report_error: take a Gram matrix only to report each layer's error, for methods that do without one (Wanda, magnitude).
            It costs about as much as the forwards. SparseGPT and ALPS always report it, KPrune that of its sub-layers.
        format: of what is saved to `out`, as for `sparsekern.save`: `"dense"`, `"packed"`, `"bitmask"` or `"N:M"`. `model` itself
            stays dense. One that the patterns are not sure to fit, such as `"2:4"` where they are shares of zeros, is refused.

    Returns:
        A `Report`: each layer's pattern, sparsity, error and seconds. `print` it or write it with `to_json`.

    Raises:
        TypeError: bad arguments, before any work is done.
        ValueError: bad arguments, and a model that cannot be pruned so, before any work is done; NaN or Inf in an activation, naming
            the linear and the calibration sample. The current block is then unchanged, earlier ones are pruned (and on disk with
            `out`). Training (`Gradual`) whose loss or weights do not stay finite leaves the model changed.
        FileExistsError: `out` holds a finished run, or something else.
        OSError: no space left in `out`, or no right to write to it, before any work is done; a disk that fails later, which leaves the
            finished blocks intact.
    """
    start = time.perf_counter()
    check_module(model)
    method = resolve_method(method)
    check_seed(seed)
    check_isa()
    check_format(format)
    if resume and out is None:
        raise ValueError("resume: expected out, the folder of the run to go on with")
    request = Request(
        pattern=None if pattern is None else parse_pattern(pattern),
        calibration=as_calibration(
            calibration,
            tokenizer=tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            sentences=isinstance(method, RemovalMethod),
        ),
        include=include,
        exclude=exclude,
        patterns=patterns,
        batch_size=batch_size,
        report_error=report_error,
        format=format,
        saves=out is not None,
        seed=seed,
    )
    remedy = f"what is pruned is kept in {out}: resume=True (--resume) needs only to save it; {DENSE_FITS}"
    options: dict[str, Any] = {"tokenizer": tokenizer, "format": format, "method": method, "resume": resume, "remedy": remedy}
    with plain_modes(model) as model, RunFolder.opened(out, model, **options) as folder:
        loop = loop_of(method)
        plan, batches = loop.make_plan(model, method, request)
        settings: dict[str, Any] = {"method": method.settings(), "seed": seed, **plan.settings}
        settings["calibration"] = batches and fingerprint(batches)
        checkpoint = None
        if folder is not None:
            settings["model"] = model_fingerprint(model)
            checkpoint = folder.checkpoint(settings, environment(model), resume=resume)
        report = loop.REPORT(
            settings={**loop.described(request), **settings},
            versions=environment(model),
            calibration_tokens=sum(batch.tokens for batch in batches or ()),
        )
        dense_bytes = weight_bytes(model)
        with running(model, plan, method, batches, seed=seed, checkpoint=checkpoint, report=report, progress=progress) as context:
            loop(context).run()
        clock = context.clock
        if folder is not None:
            folder.write(model, report, dense_bytes=dense_bytes, clock=clock, start=start)
        else:
            report.seconds = {**clock.seconds, "total": time.perf_counter() - start}
        return report


def loop_of(method: Method) -> type[Loop]:
    """Return the loop that runs the methods of a class."""
    return next(loop for kind, loop in LOOPS.items() if isinstance(method, kind))
