"""The common base of all reports. It holds a run's settings and measurements, and writes and reads report files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .._files import write_atomically
from . import schema
from .html import Page, render
from .schema import Fields

CLASSES: dict[str, type[BaseReport]] = {}


DIVERGENCE, AGREEMENT = "divergence from dense", "agreement with dense"  # names of measurements


@dataclass(kw_only=True)
class BaseReport(ABC):
    """Base of the reports. `print` a report, or write it with `to_json` or `to_html`.

    Attributes:
        kind: the `kind` in report.json; each concrete class has its own.
        settings: everything that the result depends on: method, pattern, seed, and digests of the model and the calibration.
        versions: versions of the packages, and the run's device and threads.
        command: the command line that started the run; None where Python called it.
        seconds: seconds of each phase, and their `total`.
        size: bytes of the weights if the model was saved: `dense` in memory, and `saved` in its files.
        measured: other measurements by name, numbers or texts, such as `"perplexity, pruned"`.
    """

    kind: ClassVar[str]

    settings: dict[str, object] = field(default_factory=dict)
    versions: dict[str, object] = field(default_factory=dict)
    command: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    measured: dict[str, float | str] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        CLASSES[cls.kind] = cls

    @staticmethod
    def from_json(path: str | os.PathLike) -> BaseReport:
        """Return the report in the file `path`, of any kind, as an object of the class that wrote it.

        Values that follow from other fields, such as `sparsity`, are not read. `settings`, `versions` and `measured` may hold any
        names.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not JSON or no report, or has a newer schema, an unknown kind, or an unknown, missing or bad
                field, which the message names.
        """
        return BaseReport.read(schema.loads(Path(path)))

    @staticmethod
    def read(fields: Fields) -> BaseReport:
        """Return the report of any kind with these fields, which are those of `to_dict` without `schema`.

        Raises:
            ValueError: an unknown kind, or an unknown, missing or bad field.
        """
        kind = fields.take("kind", schema.text)
        if kind not in CLASSES:
            fields.refuse("kind", f"one of {', '.join(sorted(CLASSES))}", kind)
        cls = CLASSES[kind]
        run, results = fields.inside("run"), fields.inside("results")
        size = results.take("size", schema.mapping(schema.whole))
        if size and size.keys() != {"dense", "saved"}:
            results.refuse("size", "dense and saved", list(size))
        found: dict[str, Any] = {  # arguments of `cls`, each read with its type
            "settings": run.take("settings", schema.mapping(schema.anything)),
            "versions": run.take("versions", schema.mapping(schema.anything)),
            "command": run.take("command", schema.optional(schema.text)),
            "seconds": run.take("seconds", schema.mapping(schema.number)),
            "size": size,
            "measured": results.take("measured", schema.mapping(schema.measurement)),
        }
        found |= cls._read(run, results, fields.each("layers"))
        for part in (run, results, fields):
            part.end()
        return cls(**found)

    def to_dict(self) -> dict[str, object]:
        """Return the content of `report.json`, with infinity and NaN as numbers."""
        return {
            "schema": schema.SCHEMA,
            "kind": self.kind,
            "run": {
                "command": self.command,
                "settings": self.settings,
                "versions": self.versions,
                "seconds": self.seconds,
                **self._run(),
            },
            "results": {**self._results(), "size": self.size, "measured": self.measured},
            "layers": self._layers(),
        }

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the report as strict JSON to the file `path`, as a whole or not at all."""
        write_atomically(Path(path), schema.dumps(self.to_dict()))

    def to_html(self, path: str | os.PathLike) -> None:
        """Write a page with plots and a table to the file `path`, as a whole or not at all."""
        write_atomically(Path(path), render(self.page()).encode("utf-8", "replace"))

    @abstractmethod
    def summary(self) -> dict[str, float | str]:
        """Return the main results by name, as numbers or texts, for a model card and for a terminal."""

    @abstractmethod
    def page(self) -> Page:
        """Return the content of the report's page."""

    @abstractmethod
    def _run(self) -> dict[str, object]:
        """Return the entries of `run` that only this kind has."""

    @abstractmethod
    def _results(self) -> dict[str, object]:
        """Return the entries of `results` that only this kind has."""

    @abstractmethod
    def _layers(self) -> list[dict[str, object]]:
        """Return the entries of `layers`."""

    @classmethod
    @abstractmethod
    def _read(cls, run: Fields, results: Fields, layers: list[Fields]) -> dict[str, object]:
        """Return the arguments of the class that only this kind has, read from the output of `_run`, `_results` and `_layers`."""

    def _facts(self, *facts: tuple[str, object]) -> list[tuple[str, str]]:
        """Return the headline of the page: the method, then those of `facts` that are not None."""
        method = self.settings.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        return [(label, str(value)) for label, value in (("method", name), *facts) if value is not None]


def phases(seconds: dict[str, float]) -> str:
    """Return the seconds of each phase as one line of text."""
    return ", ".join(f"{phase} {taken:.1f}" for phase, taken in seconds.items())


def error_text(error: float | None) -> str:
    """Return a layer's error for a table of plain text."""
    return "-" if error is None else f"{error:.3e}"
