"""The output folder of a run. It is locked and checked before the work, and written by one function at the end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..methods import ExpertMethod, FourBits, GradualMethod, Method
from ..models.source import source_of
from ..models.stored_files import Part
from ..models.streaming import stream_of
from ..models.weight_files import weight_files
from ..reports.base import BaseReport
from ..runtime import count_zeros, model_card, weight_bytes
from ..runtime.card import with_results
from ..runtime.carry import carried_bytes, tensor_bytes, warn_of_what_stays_behind
from ..runtime.output import CONFIG, STAGING, OutputFolder, check_output_folder, checked_path
from ..runtime.save import CARD, DENSE, check_format, check_saveable, check_space, in_format, write_model
from .checkpoint import FOLDER, STATE, Checkpoint, StreamedCheckpoint
from .progress import Clock

REPORT, PAGE = "report.json", "report.html"
DENSE_FITS = "format='dense' (--format dense) always fits"
TRAINING_BYTES = 4 + 2 * 4 + 1  # a parameter in float32, its two moments and its mask
GRID_BYTES = 4 + 1  # more of them for weights of 4 bits: a master in float32, and its share of the scales


class RunFolder:
    """The folder `out` of one run, which no other call writes to meanwhile.

    Attributes:
        path: the folder.
    """

    def __init__(self, folder: OutputFolder, tokenizer: Any, format: str, remedy: str, method: Method | None) -> None:
        self._folder, self._tokenizer, self._format, self._remedy, self._method = folder, tokenizer, format, remedy, method
        self.path = folder.path

    @classmethod
    @contextmanager
    def opened(
        cls,
        out: str | os.PathLike | None,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        format: str = DENSE,
        method: Method | None = None,
        resume: bool = False,
        remedy: str,
        trains: bool = False,
        tunes: int = 0,
    ) -> Iterator[RunFolder | None]:
        """Lock the folder within, and check everything that could make the end of the run fail.

        Args:
            out: a new or empty folder, or one with an unfinished run. None yields None.
            model: the model to prune and save.
            tokenizer: saved with the model; None saves none.
            format: format of the weights, as for `sparsekern.save`.
            method: the method of a run that keeps its blocks in `out`; None for a run that does not.
            resume: continue an unfinished run in `out`.
            remedy: the end of the message if the pruned model cannot be saved: where it is kept, and how to save it.
            trains: whether the state of a training is kept too, beside that of the method.
            tunes: the number of blocks that are tuned together. Each block is kept with those in front of it, which change again.

        Raises:
            FileExistsError: `out` is a file, or holds a finished run or other files.
            TypeError: a model or a tokenizer without `save_pretrained`.
            ValueError: an unknown format; a model or a tokenizer that transformers refuses to save; a folder that another run
                uses; an unfinished run without `resume`.
            OSError: no space for the weights, or a folder that cannot be written to.
        """
        check_format(format)
        if out is None:
            yield None
            return
        warn_of_what_stays_behind(model)
        check = partial(check_out, resume=resume) if method else check_new_out
        with OutputFolder.held(out, check=check) as folder:
            if is_finished(folder.path):  # and was killed before its checkpoint was removed
                folder.remove(FOLDER)
                check(folder.path)
            check_saveable(model, tokenizer, folder)
            written = sum(file.stat().st_size for file in (folder.path / FOLDER).glob("*.safetensors"))
            check_space(model, folder.path, extra=carried_bytes(model) + _checkpoint_bytes(model, method, trains, tunes) - written)
            yield cls(folder, tokenizer, format, remedy, method)

    def checkpoint(self, model: nn.Module, settings: dict, environment: dict, *, resume: bool) -> Checkpoint:
        """Return the checkpoint of `model` in this folder, new or continued. See `Checkpoint` for the arguments and errors."""
        checkpoint = Checkpoint(self.path, settings, environment, resume=resume)
        stream = None if isinstance(self._method, ExpertMethod) else stream_of(model)  # it writes no block before all are scored
        return checkpoint if stream is None else StreamedCheckpoint(checkpoint, model, stream, self._format)

    def write(
        self, model: nn.Module, report: BaseReport, *, dense_bytes: int, clock: Clock | None = None, start: float = 0.0
    ) -> list[Part]:
        """Write all files of a finished folder: weights, tokenizer, report.json, report.html and model card.

        They appear at the same time, and the checkpoint is removed last, so a run that is killed meanwhile can be resumed.

        Args:
            model: the pruned model.
            report: the report, which gets the sizes and is then written.
            dense_bytes: size of the model's weights in memory, before the run.
            clock: the clock of a run with phases, whose seconds go into the report once the weights are written.
            start: start of the run, in `time.perf_counter` seconds.

        Returns:
            The parts of a streamed model that are stored in another form than before.

        Raises:
            ValueError: no linear gets smaller in the format.
            OSError: the disk refuses. The checkpoint or state of the run is intact.
        """
        try:
            saved = in_format(model, self._format)
            with self._folder.staged() as staging:
                with clock.phase("write") if clock else nullcontext():
                    parts = write_model(saved, staging, self._tokenizer, self._format)
                size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
                carried = 0 if stream_of(model) is not None else tensor_bytes(source_of(model))  # a stream counts all tensors
                report.size = {"dense": dense_bytes + carried, "saved": size}
                if clock is not None:
                    report.seconds = {**clock.seconds, "total": time.perf_counter() - start}
                _write_reports(staging, model, report, self._format, {})
        except ValueError as error:
            raise ValueError(f"{error}; {self._remedy}") from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "no space left to save the pruned model" if full else f"the pruned model could not be saved ({error})"
            raise OSError(error.errno, f"{what}; {self._remedy}", str(self.path)) from error
        if (stream := stream_of(model)) is not None:
            stream.take_all(weight_files(self.path), parts)
        if (self.path / FOLDER).exists():
            self._folder.remove(FOLDER)
        return parts


def check_out(out: str | os.PathLike, argument: str = "out", *, resume: bool = False) -> None:
    """Raise unless a run may begin in `out`, or continue there with `resume`. Nothing is written.

    Args:
        out: the folder.
        argument: the name of `out` in messages.
        resume: continue an unfinished run.

    Raises:
        FileExistsError: `out` is a file, or holds a finished run or other files.
        ValueError: `out` holds an unfinished run, without `resume`.
    """
    path = checked_path(out, argument)
    unfinished = (path / FOLDER).is_dir()
    if not (path / FOLDER / STATE).is_file():
        _check_not_finished(path, argument)
    if unfinished and not resume and not is_finished(path):
        raise ValueError(
            f"{argument}: {path} holds an unfinished run; pass resume=True (--resume) to continue it, or remove {path / FOLDER}"
        )
    if not unfinished:
        check_output_folder(path, argument)


def check_new_out(out: str | os.PathLike, argument: str = "out") -> None:
    """Raise unless a run that keeps nothing in `out` may begin there. Nothing is written.

    Args:
        out: the folder. What a killed run was moving into it is not in the way: it is finished first.
        argument: the name of `out` in messages.

    Raises:
        FileExistsError: `out` is a file, or holds a finished run or other files.
        ValueError: the path is not UTF-8.
    """
    path = checked_path(out, argument)
    if not (path / STAGING).exists():
        _check_not_finished(path, argument)
        check_output_folder(path, argument)


def _check_not_finished(path: Path, argument: str) -> None:
    if is_finished(path):
        raise FileExistsError(
            f"{argument}: {str(path)!r} holds a finished run, so there is nothing to resume: sparsekern.load loads its model, "
            f"{REPORT} is its report; name a new or empty folder to prune again"
        )


def rewrite_reports(
    out: str | os.PathLike, model: nn.Module, report: BaseReport, *, format: str = DENSE, settings: Mapping[str, object] = {}
) -> dict[str, object]:
    """Write the reports and the model card of a finished folder again, with later measurements.

    Args:
        out: the folder of a finished run.
        model: the pruned model.
        report: the report of that run.
        format: the format that the folder was saved in.
        settings: additional settings for the model card, numbers or texts by name.

    Returns:
        The results in the model card, numbers or texts by name.

    Raises:
        FileExistsError: `out` holds no finished run.
        ValueError: another call uses the folder.
        OSError: the disk refuses. The folder is unchanged then.
    """
    with OutputFolder.held(out, check=check_finished) as folder, folder.staged() as staging:
        return _write_reports(staging, model, report, format, settings)


def record(out: str | os.PathLike, results: Mapping[str, float | str]) -> None:
    """Add later measurements to the reports and the model card of a finished folder.

    Args:
        out: the folder of a finished run.
        results: numbers or texts by name. One of a name that is there already is replaced.

    Raises:
        FileExistsError: `out` holds no finished run.
        ValueError: another call uses the folder, or its report or card is damaged.
        OSError: the disk refuses. The folder is unchanged then.
    """
    with OutputFolder.held(out, check=check_finished) as folder, folder.staged() as staging:
        report = BaseReport.from_json(folder.path / REPORT)
        report.measured = {**report.measured, **results}
        report.to_json(staging / REPORT)
        report.to_html(staging / PAGE)
        card = (folder.path / CARD).read_text(encoding="utf-8")
        (staging / CARD).write_text(with_results(card, results), encoding="utf-8")


def _write_reports(
    folder: Path, model: nn.Module, report: BaseReport, format: str, settings: Mapping[str, object]
) -> dict[str, object]:
    report.to_json(folder / REPORT)
    report.to_html(folder / PAGE)
    rows = {**_settings_rows(report), **settings}
    results = {**report.measured, **report.summary(), **_size_rows(model, report, format)}
    card = model_card(model, packed=format != DENSE, command=report.command, results=results, settings=rows)
    (folder / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
    return results


def _settings_rows(report: BaseReport) -> dict[str, object]:
    """Return the settings for a model card: numbers, texts, and the method in words."""
    rows: dict[str, object] = {}
    for name, value in report.settings.items():
        if name in ("method", "then") and isinstance(value, Mapping):
            rows[name] = described(value)
        elif name not in ("model", "calibration") and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            rows[name] = value
    tokens = getattr(report, "calibration_tokens", 0)
    return {**rows, "calibration tokens": tokens} if tokens else rows


def described(method: Mapping[str, object]) -> str:
    """Return the settings of a method in words, as in `sparsegpt (damping 0.01, block_size 128)`."""
    settings = ", ".join(f"{name} {value}" for name, value in method.items() if name != "name" and value is not None)
    return f"{method.get('name')} ({settings})" if settings else str(method.get("name"))


def _size_rows(model: nn.Module, report: BaseReport, format: str) -> dict[str, object]:
    zeros, total = count_zeros(model)
    rows: dict[str, object] = {"zeros in the whole model": f"{zeros / total:.2%} of {total / 1e6:,.1f} M weights"}
    if report.size:
        saved = f"{report.size['saved'] / 1e6:,.1f} MB"
        rows["weights"] = f"{report.size['dense'] / 1e6:,.1f} MB, saved {format} in {saved}"
    return rows


def _checkpoint_bytes(model: nn.Module, method: Method | None, trains: bool, tunes: int = 0) -> int:
    """Return the bytes that a run keeps beside the finished model: its blocks, and training's state twice while replaced."""
    a_weight = TRAINING_BYTES + (GRID_BYTES if isinstance(method, FourBits) else 0)
    training = 2 * a_weight * sum(parameter.numel() for parameter in model.parameters())
    if isinstance(method, GradualMethod):
        return training if method.trains else 0
    blocks = 0 if method is None or stream_of(model) is not None else max(1, tunes) * weight_bytes(model)
    return blocks + (training if trains else 0)


def check_finished(path: Path, argument: str) -> None:
    """Raise `FileExistsError` unless `path` holds a finished run."""
    if not is_finished(path):
        raise FileExistsError(f"{argument}: expected a folder with a finished run, got {str(path)!r}")


def is_finished(path: Path) -> bool:
    """Return whether a run has moved its model to `path`. The config is moved last."""
    return (path / CONFIG).exists() and (path / REPORT).exists()
