"""The function `prune_continually`: prune a model for one calibration dataset after another, without keeping any of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...backends.libraries import check_isa
from ...data import as_calibration, is_source
from ...data.perplexity import as_evaluation, evaluation_windows, windows_together
from ...methods import METHODS, BlockMethod, LinearMethod, Magnitude, Method, check_choice, resolve_method
from ...models.fingerprint import model_fingerprint
from ...models.limits import window_length
from ...models.memory import room_beside
from ...models.streaming import stream_of
from ...ranks import World
from ...reports.continual import ContinualReport
from ...runtime import check_format, weight_bytes
from ...runtime.output import checked_path
from ...runtime.save import DENSE
from ..batches import Batch, Calibration, fingerprint
from ..blockwise.experts import parted
from ..blockwise.observation import check_complete, observed
from ..memory import planned_memory
from ..mixtures import EQUAL, MAGNITUDE, ExpertRules
from ..modes import plain_modes
from ..plan import Choice, PatternLike, Plan, make_plan
from ..processes import check_same_run, checked_leaves, on_all_ranks, refuse_ranks
from ..saving import DENSE_FITS, RunFolder
from ..session import batches_for, check_format_fits, check_module, check_seed, environment, prepared
from ..shared_blocks import follow_written
from .loop import ContinualLoop, Evaluation
from .state import State

STRATEGIES = ("accumulate", "dense", "carry")


@on_all_ranks
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
    weighting: str = EQUAL,
    unseen: str = MAGNITUDE,
    format: str = DENSE,
    leaves: int | None = None,
    max_memory: int | str | None = None,
) -> ContinualReport:
    """Prune a transformers model in place for one dataset after another. It ends pruned for all of them.

    The statistics of each dataset are added to those of the earlier ones, and each mask is chosen from the dense weights
    (`strategy="accumulate"`). So a weight that an earlier mask pruned can return, and a weight that an earlier dataset needs is
    still known to be needed, although no earlier data are kept or read. COPAL adds up importance, Wanda feature norms, SparseGPT
    and ALPS Gram matrices; magnitude has no statistics. The other strategies are baselines without this accumulation:

    * `"dense"`: each dataset prunes the dense weights by its own statistics alone, and earlier datasets are forgotten;
    * `"carry"`: each dataset prunes the weights of the step before. At the same sparsity the zeros are again the least important
      weights, so nothing changes (weight stasis), even with SparseGPT, which has no removal to compensate for.

    Args:
        model: the dense model, streamed ones included, which take a `state`. With a `state` that has seen data, the model as it was left then is taken too.
        calibrations: calibration data by name, as for `prune`, texts included. Their order is the order of the steps.
        method: `"copal"`, `"magnitude"`, `"wanda"`, `"sparsegpt"`, `"alps"`, or a config such as `COPAL(form="gram")`.
        pattern: `"N:M"` keeps N of every M consecutive inputs. A float is the share of zeros. Pattern objects are taken too.
        tokenizer: the model's tokenizer, to read texts in `calibrations` and `evaluate`. It is also saved to `out`.
        samples: number of windows of each text in `calibrations`; None is 128.
        length: tokens in a window, of `evaluate` and of texts in `calibrations`. None is 2048, or the model's positions if they are
            fewer.
        evaluate: token ids by the name of a dataset, `[tokens]`, `[rows, tokens]` or a text as `perplexity` takes them. Perplexity on
            them is taken for the dense model, and after the step of the dataset and every later step. A `state` remembers their
            digest, and takes no others under that name.
        state: a folder for a later call, in this process or another. It holds the dense weights, the sums of the statistics, the
            pruned weights of the linears and the names of the datasets. None keeps them in memory for this call. For COPAL in
            float32 it takes three times the size of the linears, and five times during a step.
        seed: seed of all random numbers.
        out: a new or empty folder, which no other program may write to meanwhile. At the end it holds the pruned model, the
            tokenizer, a model card, `report.json` and `report.html`.
        resume: continue a killed run from `state`. Finished datasets are skipped, and of the unfinished one only the missing blocks
            are pruned. The result is the same, bit for bit.
        progress: show a progress bar for each dataset.
        abandon: drop an unfinished step of `state` before `calibrations` are used, because its dataset is lost or bad.
            The dataset can then be left out, or be given again with changes.
        strategy: `"accumulate"`, `"dense"` or `"carry"`.
        include: as for `prune`.
        exclude: as for `prune`.
        patterns: as for `prune`.
        batch_size: as for `prune`.
        weighting: as for `prune`.
        unseen: as for `prune`, for linears that no token of any dataset so far reached.
        format: format of the weights in `out`, as for `prune`.
        leaves: as for `prune`. It is a setting of the state.
        max_memory: as for `prune`. Hidden states that do not fit are kept in a nameless file in `state`.

    Returns:
        A `ContinualReport` of every dataset that the state has seen: the matrix of perplexities, their average after the last step,
        and the backward transfer, which is negative where datasets were forgotten.

    Raises:
        TypeError: bad arguments. They are refused before any work is done.
        ValueError: bad arguments, before any work is done. Also a state of another model, method or pattern; a dataset that it has
            already seen (without `resume`); an unfinished step (without `resume` or `abandon`); other tokens or another length to
            evaluate a dataset on than before; a state that another process uses.
        FileExistsError: `out` holds a finished run or other files.
        OSError: no space left in `state` or `out`. Everything written before is intact.

    Example:
        >>> texts = {"first": ids[:2], "second": ids[2:]}
        >>> report = sparsekern.prune_continually(model, texts, "copal", 0.5, state="state", progress=False)
        >>> report = sparsekern.prune_continually(model, {"third": ids[:1]}, "copal", 0.5, state="state", progress=False)
        >>> report.names
        ['first', 'second', 'third']

    Source: the setting of Malla, Choi and Choi, COPAL, ICML 2024. `COPAL` lists which parts are theirs.
    """
    check_module(model)
    if state is None and stream_of(model) is not None:
        raise ValueError(
            "state: expected a folder (--state), which holds the weights of a streamed model between datasets; got None"
        )
    method = check_adds_up(resolve_method(method), strategy)
    check_seed(seed)
    check_isa()
    check_format(format)
    world = World.current()
    leaves = checked_leaves(leaves, world, method)
    room_beside(model, max_memory)
    remedy = "the model in memory is pruned"
    if state is not None:
        remedy = f"what is pruned is kept in {state}: resume=True (--resume) needs only to save it; {DENSE_FITS}"
    with plain_modes(model) as model:
        plan = _with_rules(make_plan(model, pattern, patterns, include, exclude), method, ExpertRules(weighting, unseen))
        if method.needs is not None and strategy == "accumulate" and parted(plan.linears)[1]:
            refuse_ranks("model", "sums of statistics of fused experts are kept by one process")
        datasets = _datasets(
            model, method, _texts_told(calibrations, tokenizer, samples, length, seed, progress and world.leads), batch_size
        )
        plan = _observed(model, plan, method, datasets, seed)
        if length is not None and not evaluate and not any(map(is_source, calibrations.values())):
            raise ValueError(f"length: expected None unless calibrations or evaluate holds something to cut, got {length!r}")
        length = window_length(model, length)
        if out is not None:
            check_format_fits(model, plan.patterns, format)
        if state is None and (resume or abandon):
            raise ValueError(f"{'resume' if resume else 'abandon'}: expected state, the folder of the run to continue")
        if resume and abandon:
            raise ValueError("abandon: expected resume=False, since resume=True goes on with the unfinished step")
        place = None if state is None else checked_path(state, "state")
        every = [batch for batches in datasets.values() for batch in batches]
        memory = planned_memory(
            model, plan, method, every, max_memory, place, leaves // world.size, ranks=world.size, has_state=True
        )
        if out is not None and state is not None and checked_path(out, "out") == checked_path(state, "state"):
            raise ValueError(f"out: expected another folder than state, got {str(out)!r} for both")
        with (
            RunFolder.opened(out if world.leads else None, model, tokenizer=tokenizer, format=format, remedy=remedy) as folder,
            State.opened(state, world) as known,
        ):
            names = {name for name, _ in known.seen} | datasets.keys()
            evaluate = _checked_evaluation(model, evaluate, names, length, tokenizer)
            if evaluate:
                windows_together(model, length, max_memory, edited=True)  # raises if the limit is too low
            loop = ContinualLoop(
                model,
                plan,
                method,
                seed=seed,
                strategy=strategy,
                state=known,
                evaluation=Evaluation(model, evaluate, length, max_memory),
                progress=progress,
                world=world,
                leaves=leaves,
                memory=memory,
            )
            dense_bytes = weight_bytes(model)
            settings = {**_settings(model, plan, method), "strategy": strategy, "seed": seed}
            if leaves > 1 and method.needs is not None:
                settings["leaves"] = leaves
            told = {
                "calibrations": {name: fingerprint(batches) for name, batches in datasets.items()},
                "evaluate": loop.evaluation.digests,
            }
            told |= {"out": out and str(out), "state": state and str(state), "resume": resume, "abandon": abandon, "format": format}
            told |= {"max_memory": max_memory}
            check_same_run(world, {**settings, **told}, environment(model))
            loop.check(settings, abandon=abandon)
            abandoned = known.abandon() if abandon else None
            loop.check_evaluation()
            todo = _todo(known, datasets, resume)
            loop.begin(settings)
            if abandoned:
                abandoned.drop()
                known.write()
            loop.run(todo)
            report = ContinualReport(
                settings=dict(known.settings), versions=environment(model), dense=known.dense, steps=known.steps
            )
            parts = None
            if folder is not None:
                parts = folder.write(model, report, dense_bytes=dense_bytes)
            if out is not None:
                follow_written(world, model, checked_path(out, "out"), parts)
        return report


def _with_rules(plan: Plan, method: LinearMethod, rules: ExpertRules) -> Plan:
    if method.needs is None:
        rules.check_unweighted(method)
        return plan
    return plan.calibrated(rules)


def check_adds_up(method: Method, strategy: str) -> LinearMethod:
    """Return `method` if its statistics add up over datasets, and `strategy` is known.

    Every statistic adds up. Of the methods without statistics only magnitude is taken, as the baseline.

    Raises:
        ValueError: another method or strategy.
    """
    if method == Magnitude(scope="global"):
        raise ValueError(
            "method: Magnitude.scope='global' looks at all linears at once; expected 'matrix' or 'row' for several datasets"
        )
    if not isinstance(method, LinearMethod) or not _adds_up(method):
        names = (name for name, kind in METHODS.items() if _adds_up(kind()))
        raise ValueError(f"method: expected one of {', '.join(names)} for several datasets, got {method.name}")
    check_choice("strategy", strategy, STRATEGIES)
    return method


def _adds_up(method: Method) -> bool:
    if not isinstance(method, LinearMethod) or isinstance(method, BlockMethod):
        return False
    return method.needs is not None or isinstance(method, Magnitude)


def _texts_told(
    calibrations: Mapping[str, Calibration], tokenizer: Any, samples: int | None, length: int | None, seed: int, progress: bool
) -> dict[str, Calibration]:
    """Check all names. Return the calibration data with each source of a text replaced by an unread text."""
    if not isinstance(calibrations, Mapping):
        raise TypeError(f"calibrations: expected a mapping of names to calibration data, got {type(calibrations).__name__}")
    if not calibrations:
        raise ValueError("calibrations: expected at least one dataset, got none")
    for name in calibrations:
        if not isinstance(name, str) or not name:
            raise TypeError(f"calibrations: expected names of datasets, got {name!r}")
    texts = [name for name, calibration in calibrations.items() if is_source(calibration)]
    if samples is not None and not texts:
        raise ValueError(f"samples: expected None unless calibrations holds a text, got {samples!r}")
    options = {"tokenizer": tokenizer, "samples": samples, "length": length, "seed": seed, "progress": progress}
    return {**calibrations, **{name: as_calibration(calibrations[name], **options) for name in texts}}


def _datasets(
    model: nn.Module, method: Method, calibrations: Mapping[str, Calibration], batch_size: int | None
) -> dict[str, list[Batch]]:
    """Return the batches of each dataset, by name."""
    datasets = {}
    for name, calibration in calibrations.items():
        try:
            datasets[name] = batches_for(model, method, calibration, batch_size)
        except (ValueError, TypeError) as error:
            raise type(error)(f"calibrations[{name!r}]: {error}") from error
    return datasets


def _observed(model: nn.Module, plan: Plan, method: LinearMethod, datasets: Mapping[str, list[Batch]], seed: int) -> Plan:
    """Return the plan with the course of the forwards of all datasets, if the method gathers statistics."""
    if method.needs is None:
        return plan
    with prepared(model, seed):
        plan = observed(model, plan, [batch for batches in datasets.values() for batch in batches])
    for name, batches in datasets.items():
        try:
            check_complete(plan, batches)
        except ValueError as error:
            raise ValueError(f"calibrations[{name!r}]: {error}") from error
    return plan


def _checked_evaluation(
    model: nn.Module,
    evaluate: Mapping[str, torch.Tensor | str | os.PathLike] | None,
    names: set[str],
    length: int,
    tokenizer: Any,
) -> Mapping[str, torch.Tensor]:
    """Return the checked token ids to evaluate on, by dataset. Texts are read."""
    if evaluate is None:
        return {}
    if not isinstance(evaluate, Mapping):
        raise TypeError(f"evaluate: expected a mapping of names to token ids, got {type(evaluate).__name__}")
    checked = {}
    for name, ids in evaluate.items():
        if name not in names:
            raise ValueError(f"evaluate: expected names of datasets ({', '.join(sorted(names))}), got {name!r}")
        try:
            checked[name] = as_evaluation(ids, tokenizer, length)
            evaluation_windows(model, checked[name], length)
        except (ValueError, TypeError) as error:
            raise type(error)(f"evaluate[{name!r}]: {error}") from error
    return checked


def _settings(model: nn.Module, plan: Plan, method: Method) -> dict[str, object]:
    weights = [linear.parameter for linear in plan.linears]
    return {
        "method": method.settings(),
        "patterns": {name: str(value) for name, value in plan.patterns.items()},
        **plan.settings_of_experts,
        "model": model_fingerprint(model, without=weights),
    }


def _todo(state: State, datasets: Mapping[str, list[Batch]], resume: bool) -> list[tuple[str, list[Batch]]]:
    """Return the datasets that the state has not seen yet."""
    if state.under_way and not resume:
        raise ValueError(
            f"state: {state.folder} holds an unfinished step, {state.seen[-1][0]!r}; pass resume=True (--resume) and that dataset to go "
            "on, or abandon=True (--abandon) to drop it"
        )
    todo, seen = [], dict(state.seen[: len(state.steps)])
    for name, batches in datasets.items():
        if name not in seen:
            todo.append((name, batches))
        elif not resume:
            raise ValueError(
                f"calibrations: {name!r} was used already; leave it out (it is not read again), give new data another name, or "
                "pass resume=True to skip it"
            )
        elif seen[name] != fingerprint(batches):
            raise ValueError(f"calibrations: {name!r} differs from the data used before under that name")
    if state.under_way and (not todo or state.seen[-1] != [todo[0][0], fingerprint(todo[0][1])]):
        raise ValueError(
            f"calibrations: expected {state.seen[-1][0]!r} next, unchanged, to finish its step in {state.folder}; pass abandon=True "
            "(--abandon) instead of resume to drop it"
        )
    return todo
