"""The report of a run that removes experts of a mixture: the scores of each layer, and the experts that went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, ClassVar

from . import schema
from .base import BaseReport, phases
from .html import Page, by_block, lines_section, perplexity_section, seconds_section, size_section, table
from .report import Report
from .schema import Fields

COLUMNS = {
    "experts": lambda layer: layer.name,
    "kept": lambda layer: f"{layer.experts - len(layer.removed)} of {layer.experts}",
    "removed": lambda layer: ", ".join(map(str, layer.removed)),
    "highest score removed": lambda layer: f"{layer.highest_removed:.3e}",
    "lowest score kept": lambda layer: f"{layer.lowest_kept:.3e}",
    "without a token": lambda layer: str(layer.tokens.count(0)),
    "seconds": lambda layer: f"{layer.seconds:.2f}",
}
NOTE = "The experts with the lowest scores of each layer are removed; the scale is logarithmic, and scores of zero are not drawn."


@dataclass(frozen=True)
class MixtureReport:
    """One layer that lost experts.

    Attributes:
        name: name of its experts in the model.
        scores: score of each expert, by number.
        tokens: number of calibration tokens routed to each expert.
        removed: numbers of the removed experts, ascending.
        seconds: time to run the layer's block and to score its experts.
        error: None; an expert's removal is not compared with the dense output.
    """

    name: str
    scores: list[float]
    tokens: list[int]
    removed: list[int]
    seconds: float

    error: ClassVar[None] = None

    @property
    def experts(self) -> int:
        """Number of experts before the run."""
        return len(self.scores)

    @property
    def highest_removed(self) -> float:
        """The highest score of a removed expert."""
        return max(self.scores[expert] for expert in self.removed)

    @property
    def lowest_kept(self) -> float:
        """The lowest score of an expert that stays."""
        return min(score for expert, score in enumerate(self.scores) if expert not in self.removed)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MixtureReport:
        """Return the report whose fields, by `dataclasses.asdict` and JSON, are `fields`.

        Raises:
            ValueError: a field that is unknown, missing or of another type.
        """
        return cls.read(Fields(fields, "layer"))

    @classmethod
    def read(cls, fields: Fields) -> MixtureReport:
        """Return the report in an entry of `layers` in report.json."""
        layer = cls(
            fields.take("name", schema.text),
            fields.take("scores", schema.listing(schema.number)),
            fields.take("tokens", schema.listing(schema.whole)),
            fields.take("removed", schema.listing(schema.whole)),
            fields.take("seconds", schema.number),
        )
        fields.end()
        if len(layer.tokens) != layer.experts:
            fields.refuse("tokens", f"a number for each of {layer.experts} experts", len(layer.tokens))
        if not 0 < len(set(layer.removed)) < layer.experts or max(layer.removed) >= layer.experts:
            fields.refuse("removed", f"some numbers of {layer.experts} experts", layer.removed)
        return layer


@dataclass(kw_only=True)
class ExpertReport(BaseReport):
    """The result of `sparsekern.prune` with a method that removes experts.

    Attributes:
        layers: one entry for each mixture, in the order of the model.
        seconds: seconds of each phase: `capture`, `score`, `write` and `total`.
        calibration_tokens: number of calibration tokens, without padding.
        resumed_blocks: number of blocks taken from a checkpoint.
        experts: experts of each layer before and after.
        model_parameters: parameters of the whole model before and after.
        then: the report of the method that pruned the remaining experts afterwards; None for none.

    Example:
        >>> mixture = sparsekern.moefy(model, experts=6, top_k=2, calibration=ids, progress=False)
        >>> report = sparsekern.prune(mixture, "experts", "2:4", calibration=ids, then="wanda", progress=False)
        >>> report.experts, [len(layer.removed) for layer in report.layers], report.then.sparsity
        ((5, 4), [1, 1, 1], 0.5)
    """

    kind: ClassVar[str] = "experts"

    layers: list[MixtureReport] = field(default_factory=list)
    calibration_tokens: int = 0
    resumed_blocks: int = 0
    experts: tuple[int, int] = (0, 0)
    model_parameters: tuple[int, int] = (0, 0)
    then: Report | None = None

    def summary(self) -> dict[str, float | str]:
        """Return the number of experts that are left, and what the method after the removal reports."""
        (before, after), (dense, left) = self.experts, self.model_parameters
        return {
            "experts of each layer": f"{after} of {before} kept in {len(self.layers)} layers",
            "parameters of the whole model": f"{left / 1e6:,.2f} M of {dense / 1e6:,.2f} M",
            **(self.then.summary() if self.then else {}),
        }

    def page(self) -> Page:
        """Return the content of the report's page."""
        (before, after), (dense, left) = self.experts, self.model_parameters
        total = self.seconds.get("total")
        then = self.then.page() if self.then else None
        return Page(
            [
                *self._facts(
                    (f"of {before} experts left in each layer", after),
                    (f"of {dense / 1e6:,.2f} M parameters left", f"{left / 1e6:,.2f} M"),
                    ("calibration tokens", f"{self.calibration_tokens:,}" if self.calibration_tokens else None),
                    ("seconds", None if total is None else f"{total:.1f}"),
                ),
                *((f"{label}, afterwards", value) for label, value in (then.facts if then else ())),
            ],
            [
                perplexity_section(self.measured),
                size_section(self.size),
                lines_section("Scores by layer", self._scores(), x_label="block", note=NOTE, log=True),
                *(section._replace(title=f"{section.title}, afterwards") for section in (then.sections if then else ())),
                seconds_section("Time by phase", self.seconds),
            ],
            table(f"Experts of {len(self.layers)} layers", self.layers, COLUMNS),
            self.command,
            self.versions,
            [then.table] if then else [],
        )

    def _scores(self) -> dict[str, list[Any]]:
        lines = {
            "highest": lambda layer: max(layer.scores),
            "median": lambda layer: median(layer.scores),
            "lowest kept": lambda layer: layer.lowest_kept,
            "highest removed": lambda layer: layer.highest_removed,
            "lowest": lambda layer: min(layer.scores),
        }
        series = {}
        for label, value in lines.items():
            by_name = by_block(((layer.name, value(layer)) for layer in self.layers), ".3e")
            series[label] = [point for points in by_name.values() for point in points]
        return series

    def _run(self) -> dict[str, object]:
        return {"calibration_tokens": self.calibration_tokens, "resumed_blocks": self.resumed_blocks}

    def _results(self) -> dict[str, object]:
        then = None
        if self.then is not None:
            then = {name: value for name, value in self.then.to_dict().items() if name != "schema"}
        return {"experts": self.experts, "model_parameters": self.model_parameters, "then": then}

    def _layers(self) -> list[dict[str, object]]:
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def _read(cls, run: Fields, results: Fields, layers: list[Fields]) -> dict[str, object]:
        then = results.take("then", schema.optional(schema.mapping(schema.anything)))
        return {
            "layers": [MixtureReport.read(layer) for layer in layers],
            "calibration_tokens": run.take("calibration_tokens", schema.whole),
            "resumed_blocks": run.take("resumed_blocks", schema.whole),
            "experts": results.take("experts", schema.pair(schema.whole)),
            "model_parameters": results.take("model_parameters", schema.pair(schema.whole)),
            "then": None if then is None else BaseReport.read(Fields(then, "then")),
        }

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=7)
        lines = [f"{'experts':<{width}}  {'kept':>10}  {'highest removed':>15}  {'lowest kept':>11}  {'seconds':>7}"]
        for layer in self.layers:
            kept = f"{layer.experts - len(layer.removed)} of {layer.experts}"
            scores = f"{layer.highest_removed:>15.3e}  {layer.lowest_kept:>11.3e}"
            lines.append(f"{layer.name:<{width}}  {kept:>10}  {scores}  {layer.seconds:>7.2f}")
        (before, after), (dense, left) = self.experts, self.model_parameters
        lines.append(
            f"{after} of {before} experts kept in {len(self.layers)} layers, {dense / 1e6:,.2f} M parameters in all became "
            f"{left / 1e6:,.2f} M; seconds: {phases(self.seconds)}"
        )
        return "\n".join([*lines, *(["", str(self.then)] if self.then else [])])
