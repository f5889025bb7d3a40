"""`prune_continually`: a model that meets one calibration data set after another, without keeping any of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...backends.libraries import check_isa
from ...data import as_calibration, is_source
from ...data.perplexity import as_evaluation, evaluation_windows
from ...methods import METHODS, BlockMethod, LinearMethod, Magnitude, Method, check_choice, resolve_method
from ...models.limits import window_length
from ...reports.continual import ContinualReport
from ...runtime import check_format, weight_bytes
from ...runtime.save import DENSE
from ..batches import Batch, Calibration, fingerprint
from ..checkpoint import model_fingerprint
from ..modes import plain_modes
from ..plan import Choice, PatternLike, Plan, make_plan
from ..saving import DENSE_FITS, RunFolder
from ..session import batches_for, check_format_fits, check_module, check_seed, environment
from .loop import ContinualLoop, Evaluation
from .state import State

STRATEGIES = ("accumulate", "dense", "carry")


def prune_continually(
    model: nn.Module,
    calibrations: Mapping[str, Calibration],
    method: str | Method = "copal",
    pattern: PatternLike = "2:4",
    *,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
    evaluate: Mapping[str, torch.Tensor | str | os.PathLike] | None = None,
    state: str | os.PathLike | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    abandon: bool = False,
    strategy: str = "accumulate",
    include: Choice = None,
    exclude: Choice = None,
    patterns: Mapping[str, PatternLike | None] | None = None,
    batch_size: int | None = None,
    format: str = DENSE,
) -> ContinualReport:
    """Prune a transformers decoder in place for one data set after another; it ends as pruned for all of them.

    What is learned of a data set is added to what was learned of those before, and each mask is chosen anew from the dense weights
    (`strategy="accumulate"`). So a weight that an earlier mask pruned can come back, and a weight that an earlier data set needs is
    still known to be needed, although no earlier data are kept or read. What adds up is COPAL's importance, Wanda's feature norms and
    the Gram matrices of SparseGPT and ALPS; magnitude learns nothing. The other strategies are what goes wrong without:

    * `"dense"`: each data set prunes the dense weights by itself alone, and the ones before are forgotten;
    * `"carry"`: each data set prunes what the one before left. At one sparsity the zeros are the least important weights again, so
      nothing changes any more (weight stasis): neither for a method that only chooses nor for SparseGPT, which has nothing to make
      up for.

    Args:
        model: the dense model, or with a `state` that has seen data, also the model as it was left then.
        calibrations: name -> calibration data as `prune` takes them, texts included, in the order in which the model meets them.
        method: `"copal"`, `"magnitude"`, `"wanda"`, `"sparsegpt"`, `"alps"`, or a config such as `COPAL(form="gram")`.
        pattern: `"N:M"` keeps N of every M consecutive inputs; a float is the share of zeros; or a pattern object.
        tokenizer: the model's tokenizer, which texts in `calibrations` and `evaluate` are read with. It is saved to `out` too.
        samples: how many windows of each text in `calibrations`; None is 128.
        length: tokens in a window, of `evaluate` and of texts in `calibrations`. None is 2048, or the model's positions where they are
            fewer.
        evaluate: name of a data set -> token ids to take the perplexity on after its step and after every later one, and of the dense
            model; `[tokens]`, `[rows, tokens]` or a text as `perplexity` takes them. A `state` remembers them by a digest, and takes no others
            under that name.
        state: a folder for what is to be known when the next data set comes, in this process or another: dense weights,
            accumulated tensors and pruned weights of the linears, and the names of the data sets. None keeps it in memory for this
            call. For COPAL in float32 it is three times the size of the linears; while a step is under way, five times.
        seed: for whatever draws random numbers on the way.
        out: a new or empty folder, which nobody else may write to meanwhile. Once all data sets are done, it holds the pruned model, the
            tokenizer, a model card, `report.json` and `report.html`.
        resume: go on with what `state` holds of a run that was killed: data sets that are done are not done again, and of the one
            that was under way only the blocks that are missing. The result is the same, bit for bit.
        progress: show a progress bar for each data set.
        abandon: drop what `state` holds of a step that was not finished, before `calibrations` are taken in: the way out where its data
            set is lost or turned out bad. It can then be left out, or come again changed.
        strategy: `"accumulate"`, `"dense"` or `"carry"`.
        include, exclude, patterns, batch_size: as for `prune`.
        format: of what is saved to `out`, as for `prune`.

    Returns:
        A `ContinualReport` of every data set that the state has seen: the matrix of perplexities, their average after the last step,
        and the backward transfer, negative where data sets were forgotten.

    Raises:
        ValueError, TypeError: bad arguments, before any work is done: also a state made with another model, method or pattern, a data
            set that it has seen already (but with `resume`), an unfinished step (but with `resume` or `abandon`), other tokens or
            another length to evaluate a data set on than before, and a state that another process is at work on.
        OSError: no space left in `state` or `out`; what was written before is intact.

    Source: the setting of Malla, Choi and Choi, COPAL, ICML 2024; see `COPAL` for what is theirs and what was chosen here.
    """
    check_module(model)
    method = resolve_method(method)
    check_adds_up(method, strategy)
    check_seed(seed)
    check_isa()
    check_format(format)
    remedy = "the model in memory is pruned"
    if state is not None:
        remedy = f"what is pruned is kept in {state}: resume=True (--resume) needs only to save it; {DENSE_FITS}"
    with plain_modes(model) as model:
        plan = make_plan(model, pattern, patterns, include, exclude)
        data_sets = _data_sets(model, method, _texts_told(calibrations, tokenizer, samples, length, seed), batch_size)
        length = window_length(model, length)
        if out is not None:
            check_format_fits(model, plan.patterns, format)
        if state is None and (resume or abandon):
            raise ValueError(f"{'resume' if resume else 'abandon'}: expected state, the folder of the run to go on with")
        if resume and abandon:
            raise ValueError("abandon: expected resume=False, since resume=True goes on with the unfinished step")
        with (
            RunFolder.opened(out, model, tokenizer=tokenizer, format=format, remedy=remedy) as folder,
            State.opened(state) as known,
        ):
            names = {name for name, _ in known.seen} | data_sets.keys()
            evaluate = _checked_evaluation(model, evaluate, names, length, tokenizer)
            loop = ContinualLoop(
                model,
                plan,
                method,
                seed=seed,
                strategy=strategy,
                state=known,
                evaluation=Evaluation(model, evaluate, length),
                progress=progress,
            )
            dense_bytes = weight_bytes(model)
            loop.begin({**_settings(model, plan, method), "strategy": strategy, "seed": seed})
            abandoned = known.abandon() if abandon else None
            loop.check_evaluation()
            todo = _todo(known, data_sets, resume)
            if abandoned:
                abandoned.drop()
                known.write()
            loop.run(todo)
            report = ContinualReport(
                settings=dict(known.settings), versions=environment(model), dense=known.dense, steps=known.steps
            )
            if folder is not None:
                folder.write(model, report, dense_bytes=dense_bytes)
        return report


def check_adds_up(method: Method, strategy: str) -> None:
    """Raise unless what `method` learns adds up over datasets, and `strategy` is known.

    Every statistic adds up. Of the methods without statistics only magnitude is taken, as the baseline.

    Raises:
        ValueError: another method or strategy.
    """
    if method == Magnitude(scope="global"):
        raise ValueError(
            "method: Magnitude.scope='global' looks at all linears at once; expected 'matrix' or 'row' for several data sets"
        )
    if not _adds_up(method):
        names = (name for name, kind in METHODS.items() if _adds_up(kind()))
        raise ValueError(f"method: expected one of {', '.join(names)} for several data sets, got {method.name}")
    check_choice("strategy", strategy, STRATEGIES)


def _adds_up(method: Method) -> bool:
    if not isinstance(method, LinearMethod) or isinstance(method, BlockMethod):
        return False
    return method.needs is not None or isinstance(method, Magnitude)


def _texts_told(
    calibrations: Mapping[str, Calibration], tokenizer: Any, samples: int | None, length: int | None, seed: int
) -> dict[str, Calibration]:
    """Return the calibration data with each name of a text replaced by the text that is to be read, after checking all names."""
    if not isinstance(calibrations, Mapping):
        raise TypeError(f"calibrations: expected a mapping of names to calibration data, got {type(calibrations).__name__}")
    if not calibrations:
        raise ValueError("calibrations: expected at least one data set, got none")
    for name in calibrations:
        if not isinstance(name, str) or not name:
            raise TypeError(f"calibrations: expected names of data sets, got {name!r}")
    texts = [name for name, calibration in calibrations.items() if is_source(calibration)]
    if samples is not None and not texts:
        raise ValueError(f"samples: expected None, calibrations holds no text to be cut into samples; got {samples!r}")
    options = {"tokenizer": tokenizer, "samples": samples, "length": length, "seed": seed}
    return {**calibrations, **{name: as_calibration(calibrations[name], **options) for name in texts}}


def _data_sets(
    model: nn.Module, method: Method, calibrations: Mapping[str, Calibration], batch_size: int | None
) -> dict[str, list[Batch]]:
    data_sets = {}
    for name, calibration in calibrations.items():
        try:
            data_sets[name] = batches_for(model, method, calibration, batch_size)
        except (ValueError, TypeError) as error:
            raise type(error)(f"calibrations[{name!r}]: {error}") from error
    return data_sets


def _checked_evaluation(
    model: nn.Module,
    evaluate: Mapping[str, torch.Tensor | str | os.PathLike] | None,
    names: set[str],
    length: int,
    tokenizer: Any,
) -> Mapping[str, torch.Tensor]:
    """Return the token ids to evaluate on, those of texts read, every one being checked."""
    if evaluate is None:
        return {}
    if not isinstance(evaluate, Mapping):
        raise TypeError(f"evaluate: expected a mapping of names to token ids, got {type(evaluate).__name__}")
    checked = {}
    for name, ids in evaluate.items():
        if name not in names:
            raise ValueError(f"evaluate: expected names of data sets ({', '.join(sorted(names))}), got {name!r}")
        try:
            checked[name] = as_evaluation(ids, tokenizer, length)
            evaluation_windows(model, checked[name], length)
        except (ValueError, TypeError) as error:
            raise type(error)(f"evaluate[{name!r}]: {error}") from error
    return checked


def _settings(model: nn.Module, plan: Plan, method: Method) -> dict[str, object]:
    weights = [module.weight for linear in plan.linears for module in linear.modules]
    return {
        "method": method.settings(),
        "patterns": {name: str(value) for name, value in plan.patterns.items()},
        "model": model_fingerprint(model, without=weights),
    }


def _todo(state: State, data_sets: Mapping[str, list[Batch]], resume: bool) -> list[tuple[str, list[Batch]]]:
    """The data sets that the state has not taken in yet."""
    if state.under_way and not resume:
        raise ValueError(
            f"state: {state.folder} holds an unfinished step, {state.seen[-1][0]!r}; pass resume=True (--resume) and that data set to go "
            "on, or abandon=True (--abandon) to drop it"
        )
    todo, seen = [], dict(state.seen[: len(state.steps)])
    for name, batches in data_sets.items():
        if name not in seen:
            todo.append((name, batches))
        elif not resume:
            raise ValueError(
                f"calibrations: {name!r} was taken in already; leave it out (it is not read again), give new data another name, or "
                "pass resume=True to skip it"
            )
        elif seen[name] != fingerprint(batches):
            raise ValueError(f"calibrations: {name!r} is not what was taken in under that name")
    if state.under_way and (not todo or state.seen[-1] != [todo[0][0], fingerprint(todo[0][1])]):
        raise ValueError(
            f"calibrations: expected {state.seen[-1][0]!r} next, unchanged, to finish its step in {state.folder}; pass abandon=True "
            "(--abandon) instead of resume to drop it"
        )
    return todo
