"""The report of a model pruned for one dataset after another: perplexities after each, their average, and the forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from . import schema
from .base import BaseReport
from .html import Page, lines_section, seconds_section, shown, size_section, table
from .plots import Point
from .schema import Fields


@dataclass(frozen=True)
class ContinualStep:
    """One dataset that the model was pruned for.

    Attributes:
        name: name of the dataset.
        tokens: number of calibration tokens, without padding.
        sparsity: share of zeros among the weights of the pruned linears.
        changed: share of these weights that became zero or nonzero in this step; None at the first step.
        seconds: duration of the step.
        perplexity: perplexities of the model after this step, by dataset.
    """

    name: str
    tokens: int
    sparsity: float
    changed: float | None
    seconds: float
    perplexity: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ContinualStep:
        """Return the step whose fields, by `dataclasses.asdict` and JSON, are `fields`.

        Raises:
            ValueError: a field that is unknown, missing or of another type.
        """
        return cls.read(Fields(fields, "step"))

    @classmethod
    def read(cls, fields: Fields) -> ContinualStep:
        """Return the step in an entry of `steps` in report.json."""
        step = cls(
            fields.take("name", schema.text),
            fields.take("tokens", schema.whole),
            fields.take("sparsity", schema.number),
            fields.take("changed", schema.optional(schema.number)),
            fields.take("seconds", schema.number),
            fields.take("perplexity", schema.mapping(schema.number), {}),
        )
        fields.end()
        return step


@dataclass(kw_only=True)
class ContinualReport(BaseReport):
    """The result of `sparsekern.prune_continually`.

    Attributes:
        dense: perplexities of the dense model, by dataset.
        steps: all datasets that the state has seen, in their order; those of this call are the last.

    Example:
        >>> options = {"evaluate": {"first": ids[0], "second": ids[2]}, "length": 16, "progress": False}
        >>> report = sparsekern.prune_continually(model, {"first": ids[:2], "second": ids[2:]}, "wanda", 0.5, **options)
        >>> report.names, [len(row) for row in report.matrix]
        (['first', 'second'], [2, 2])
    """

    kind: ClassVar[str] = "continual"

    dense: dict[str, float] = field(default_factory=dict)
    steps: list[ContinualStep] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of the datasets, in their order."""
        return [step.name for step in self.steps]

    @property
    def matrix(self) -> list[list[float | None]]:
        """The matrix `R[t][i]` of the perplexity on dataset `i` after step `t`; None where it was not taken, as for `i > t`."""
        return [[step.perplexity.get(name) for name in self.names] for step in self.steps]

    @property
    def average_perplexity(self) -> float | None:
        """The mean over all datasets of the perplexity after the last step; None where one is missing."""
        return _mean(self.matrix[-1]) if self.steps else None

    @property
    def backward_transfer(self) -> float | None:
        """The mean of `R[i, i] - R[T, i]` in perplexity, over all datasets `i` except the last, `T`.

        **Negative means forgetting.** Positive means that later datasets improved the model on earlier ones. As for Lopez-Paz and
        Ranzato (2017), who use accuracy, higher is better. None where a perplexity is missing or there is only one dataset; NaN
        where both perplexities of a dataset are infinite.
        """
        table, last = self.matrix, len(self.steps) - 1
        pairs = [(table[i][i], table[last][i]) for i in range(last)]
        return _mean([None if before is None or after is None else before - after for before, after in pairs])

    def summary(self) -> dict[str, float | str]:
        """Return those perplexities after the last step that were taken, their mean and the backward transfer."""
        last = self.steps[-1].perplexity if self.steps else {}
        rows = {f"perplexity, {name}": value for name, value in last.items()}
        means = {"average perplexity": self.average_perplexity, "backward transfer": self.backward_transfer}
        return {**rows, **{name: value for name, value in means.items() if value is not None}}

    def page(self) -> Page:
        """Return the content of the report's page."""
        average, transfer, strategy = self.average_perplexity, self.backward_transfer, self.settings.get("strategy")
        rows = [*([("dense", self.dense)] if self.dense else []), *((step.name, step.perplexity) for step in self.steps)]
        series: dict[str, list[Point]] = {}
        for x, (after, perplexities) in enumerate(rows, start=0 if self.dense else 1):
            for name, value in perplexities.items():
                series.setdefault(name, []).append(Point(x, value, f"{name}, after {after}: {value:.4g}"))
        columns = {"after": lambda row: row[0]} | {
            name: lambda row, name=name: shown(row[1].get(name), ".4g") for name in self.names
        }
        return Page(
            self._facts(
                ("strategy", strategy),
                ("datasets", len(self.steps)),
                ("average perplexity", None if average is None else f"{average:.4g}"),
                ("backward transfer (negative: forgetting)", None if transfer is None else f"{transfer:+.3g}"),
            ),
            [
                lines_section(
                    "Perplexity of each dataset, step by step",
                    series,
                    x_label="datasets so far",
                    note="The scale is logarithmic; lower is better.",
                    log=True,
                ),
                size_section(self.size),
                seconds_section("Time by dataset", {step.name: step.seconds for step in self.steps}),
            ],
            table("All perplexities", rows, columns),
            self.command,
            self.versions,
        )

    def _run(self) -> dict[str, object]:
        return {}

    def _results(self) -> dict[str, object]:
        return {
            "names": self.names,
            "dense": self.dense,
            "perplexity": self.matrix,
            "average_perplexity": self.average_perplexity,
            "backward_transfer": self.backward_transfer,
            "backward_transfer_sign": "mean of R[i, i] - R[T, i]; negative is forgetting",
            "steps": [asdict(step) for step in self.steps],
        }

    def _layers(self) -> list[dict[str, object]]:
        return []

    @classmethod
    def _read(cls, run: Fields, results: Fields, layers: list[Fields]) -> dict[str, object]:
        results.skip("names", "perplexity", "average_perplexity", "backward_transfer", "backward_transfer_sign")
        for layer in layers:
            layer.end()
        return {
            "dense": results.take("dense", schema.mapping(schema.number)),
            "steps": [ContinualStep.read(step) for step in results.each("steps")],
        }

    def __str__(self) -> str:
        first = max(map(len, ["after", "dense", *self.names]))
        widths = [max(len(name), 9) for name in self.names]

        def line(label: str, perplexities: dict[str, float]) -> str:
            cells = (f"{perplexities[n]:.3f}" if n in perplexities else "-" for n in self.names)
            return f"{label:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

        lines = [f"{'after':<{first}}" + "".join(f"  {n:>{w}}" for n, w in zip(self.names, widths, strict=True)) + "  (perplexity)"]
        if self.dense:
            lines.append(line("dense", self.dense))
        for step in self.steps:
            changed = "" if step.changed is None else f", mask changed {step.changed:.2%}"
            lines.append(line(step.name, step.perplexity) + f"  {step.sparsity:.2%} zeros{changed}, {step.seconds:.1f} s")
        if self.average_perplexity is not None:
            lines.append(f"average perplexity {self.average_perplexity:.3f}")
        if self.backward_transfer is not None:
            lines.append(f"backward transfer  {self.backward_transfer:+.3f} (negative: forgetting)")
        return "\n".join(lines)


def _mean(values: list[float | None]) -> float | None:
    """Return the mean, or None where a value is missing or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
