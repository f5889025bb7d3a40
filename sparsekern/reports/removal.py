"""The report of a run that removes whole heads and neurons: the units that each sub-layer keeps, and the savings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from . import schema
from .base import BaseReport, error_text, phases
from .html import Page, by_block, lines_section, perplexity_section, seconds_section, shown, size_section, table
from .schema import Fields

ERROR_NOTE = (
    "Relative squared error of the residual stream behind each sub-layer over the calibration tokens, with the errors of those below; "
    "the scale is logarithmic."
)
COLUMNS = {
    "block": lambda layer: layer.name,
    "units": lambda layer: layer.kind,
    "kept": lambda layer: f"{layer.kept} of {layer.units}",
    "error": lambda layer: shown(layer.error, ".3e"),
    "seconds": lambda layer: f"{layer.seconds:.2f}",
}


@dataclass(frozen=True)
class SubLayerReport:
    """One sub-layer that lost units.

    Attributes:
        name: name of its block in the model.
        kind: `"heads"` or `"neurons"`.
        units: number of units before the run.
        kept: number of units that remain.
        error: relative squared error of the residual stream behind the sub-layer, before its LayerNorm, over the calibration tokens.
            It includes the errors of the sub-layers below.
        seconds: time to score, search and fit it.
    """

    name: str
    kind: str
    units: int
    kept: int
    error: float
    seconds: float

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SubLayerReport:
        """Return the report whose fields, by `dataclasses.asdict` and JSON, are `fields`.

        Raises:
            ValueError: a field that is unknown, missing or of another type.
        """
        return cls.read(Fields(fields, "layer"))

    @classmethod
    def read(cls, fields: Fields) -> SubLayerReport:
        """Return the report in an entry of `layers` in report.json."""
        layer = cls(
            fields.take("name", schema.text),
            fields.take("kind", schema.text),
            fields.take("units", schema.whole),
            fields.take("kept", schema.whole),
            fields.take("error", schema.number),
            fields.take("seconds", schema.number),
        )
        fields.end()
        if layer.kind not in ("heads", "neurons"):
            fields.refuse("kind", "heads or neurons", layer.kind)
        if not layer.units:
            fields.refuse("units", "at least 1", layer.units)
        if layer.kept > layer.units:
            fields.refuse("kept", f"at most {layer.units}", layer.kept)
        return layer


@dataclass(kw_only=True)
class RemovalReport(BaseReport):
    """The result of `sparsekern.prune` with a method that removes whole units.

    Attributes:
        layers: one entry for each sub-layer, bottom to top.
        seconds: seconds of each phase: `capture`, `score`, `search`, `tune`, `forward`, `write` and `total`.
        calibration_tokens: number of calibration tokens, without padding.
        resumed_blocks: number of sub-layers taken from a checkpoint.
        flops: FLOPs of the heads and neurons before and after, as the mean over the calibration samples.
        parameters: parameters of the heads and neurons before and after.
        model_parameters: parameters of the whole model before and after.

    Example:
        >>> report = sparsekern.prune(encoder, "kprune", calibration=ids, progress=False)
        >>> [(layer.kind, layer.units) for layer in report.layers[:2]]
        [('heads', 4), ('neurons', 48)]
        >>> 0.5 <= report.flops_removed < 0.6
        True
    """

    kind: ClassVar[str] = "removal"

    layers: list[SubLayerReport] = field(default_factory=list)
    calibration_tokens: int = 0
    resumed_blocks: int = 0
    flops: tuple[float, float] = (0.0, 0.0)
    parameters: tuple[int, int] = (0, 0)
    model_parameters: tuple[int, int] = (0, 0)

    @property
    def parameters_removed(self) -> float:
        """The removed share of the parameters of heads and neurons."""
        return _removed(self.parameters)

    @property
    def flops_removed(self) -> float:
        """The removed share of the FLOPs of heads and neurons."""
        return _removed(self.flops)

    def summary(self) -> dict[str, float | str]:
        """Return the removed shares, and the number of units that each layer keeps."""
        removed = {"FLOPs": self.flops_removed, "parameters": self.parameters_removed}
        kept = {kind: ", ".join(str(layer.kept) for layer in self.layers if layer.kind == kind) for kind in ("heads", "neurons")}
        before, after = self.model_parameters
        return {
            **{f"{what} of heads and neurons": f"{share:.2%} removed" for what, share in removed.items()},
            **{f"{kind}, layer by layer": f"kept {counts}" for kind, counts in kept.items()},
            "parameters of the whole model": f"{after / 1e6:,.2f} M of {before / 1e6:,.2f} M",
        }

    def page(self) -> Page:
        """Return the content of the report's page."""
        before, after = self.model_parameters
        total = self.seconds.get("total")
        share = {f"{layer.name}.{layer.kind}": layer.kept / layer.units for layer in self.layers}
        error = {f"{layer.name}.{layer.kind}": layer.error for layer in self.layers}
        return Page(
            self._facts(
                ("of the FLOPs of heads and neurons removed", f"{self.flops_removed:.1%}"),
                (f"of {before / 1e6:,.2f} M parameters left", f"{after / 1e6:,.2f} M"),
                ("calibration tokens", f"{self.calibration_tokens:,}" if self.calibration_tokens else None),
                ("seconds", None if total is None else f"{total:.1f}"),
            ),
            [
                perplexity_section(self.measured),
                size_section(self.size),
                lines_section(
                    "Heads and neurons left", by_block(share.items(), ".1%"), x_label="block", note="Share of each block's."
                ),
                lines_section("Error by sub-layer", by_block(error.items(), ".3e"), x_label="block", note=ERROR_NOTE, log=True),
                seconds_section("Time by phase", self.seconds),
            ],
            table(f"All {len(self.layers)} sub-layers", self.layers, COLUMNS),
            self.command,
            self.versions,
        )

    def _run(self) -> dict[str, object]:
        return {"calibration_tokens": self.calibration_tokens, "resumed_blocks": self.resumed_blocks}

    def _results(self) -> dict[str, object]:
        return {
            "flops": self.flops,
            "flops_removed": self.flops_removed,
            "parameters": self.parameters,
            "parameters_removed": self.parameters_removed,
            "model_parameters": self.model_parameters,
        }

    def _layers(self) -> list[dict[str, object]]:
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def _read(cls, run: Fields, results: Fields, layers: list[Fields]) -> dict[str, object]:
        results.skip("flops_removed", "parameters_removed")
        return {
            "layers": [SubLayerReport.read(layer) for layer in layers],
            "calibration_tokens": run.take("calibration_tokens", schema.whole),
            "resumed_blocks": run.take("resumed_blocks", schema.whole),
            "flops": results.take("flops", schema.pair(schema.number)),
            "parameters": results.take("parameters", schema.pair(schema.whole)),
            "model_parameters": results.take("model_parameters", schema.pair(schema.whole)),
        }

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'units':<7}  {'kept':>13}  {'error':>9}  {'seconds':>7}"]
        for layer in self.layers:
            kept = f"{layer.kept} of {layer.units}"
            lines.append(f"{layer.name:<{width}}  {layer.kind:<7}  {kept:>13}  {error_text(layer.error):>9}  {layer.seconds:>7.2f}")
        before, after = self.model_parameters
        lines.append(
            f"{self.flops_removed:.2%} of the FLOPs and {self.parameters_removed:.2%} of the parameters of heads and neurons removed, "
            f"{before / 1e6:,.2f} M parameters in all became {after / 1e6:,.2f} M; seconds: {phases(self.seconds)}"
        )
        return "\n".join(lines)


def _removed(before_and_after: tuple[float, float]) -> float:
    before, after = before_and_after
    return 1 - after / before if before else 0.0
