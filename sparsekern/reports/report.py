"""The report of a run that makes weights zero: each linear's pattern, sparsity, error and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from . import schema
from .base import AGREEMENT, DIVERGENCE, BaseReport, error_text, phases
from .experts import starred
from .html import Page, Section, by_block, lines_section, perplexity_section, seconds_section, shown, size_section, table
from .plots import Point
from .schema import Fields

FLAT = 5e-4  # sparsities that differ by less are one number, not a plot
ERROR_NOTE = "Relative squared error of each linear's output over the calibration tokens; the scale is logarithmic."
CORRECTION_NOTE = "Share of the correction that is taken of each linear, which held-out samples decide."
TUNING_NOTE = "Mean relative squared error of a held-out token's hidden state behind each block; the scale is logarithmic."
DISTILLATION_NOTE = "Mean Kullback-Leibler divergence of the held-out tokens' predictions from those of the dense model, in nats."
COLUMNS = {
    "linear": lambda layer: layer.name,
    "shape": lambda layer: " × ".join(map(str, layer.shape)),
    "pattern": lambda layer: layer.pattern,
    "zeros": lambda layer: f"{layer.sparsity:.2%}",
    "error": lambda layer: shown(layer.error, ".3e"),
    "seconds": lambda layer: f"{layer.seconds:.2f}",
}


@dataclass(frozen=True)
class LayerReport:
    """One pruned linear.

    Attributes:
        name: name of the linear in the model.
        pattern: the pattern that it was pruned to.
        shape: `(out_features, in_features)` of its weight.
        zeros: number of zeros in its weight.
        error: relative squared error of its output over the calibration tokens, `tr((Ŵ-W) G (Ŵ-W)^T) / tr(W G W^T)`. `G` is the
            undamped Gram matrix of its inputs, and `Ŵ` the stored weight. None where no Gram matrix was taken.
        seconds: time to solve it, including the factorisation if this linear was the first to need it. A linear of a feed-forward
            network that was solved as a whole has an equal share of the network's time.
        output_error: relative squared error of the network's output, at the last linear of such a network; None elsewhere.
        output_error_alone: the same error with the network pruned linear by linear by the solver inside.
        values_error: the part of `error` that rounding the kept weights to 4 bits made, relative to the same output; None where they
            are not rounded.
        correction: how far its target was corrected before it was pruned: the shares `inputs` and `residual` of the two corrections,
            from 0 to 1, the `damping`, and the `gain`, what they take away of the relative squared error of its output over the
            held-out tokens. None where `correction="dense"` was not asked for.
    """

    name: str
    pattern: str
    shape: tuple[int, int]
    zeros: int
    error: float | None
    seconds: float
    output_error: float | None = None
    output_error_alone: float | None = None
    values_error: float | None = None
    correction: dict[str, float] | None = None

    @property
    def sparsity(self) -> float:
        """The share of zeros in the weight."""
        return self.zeros / (self.shape[0] * self.shape[1])

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerReport:
        """Return the report whose fields, by `dataclasses.asdict` and JSON, are `fields`.

        Raises:
            ValueError: a field that is unknown, missing or of another type.
        """
        return cls.read(Fields(fields, "layer"))

    @classmethod
    def read(cls, fields: Fields) -> LayerReport:
        """Return the report in an entry of `layers` in report.json."""
        error = schema.optional(schema.number)
        layer = cls(
            fields.take("name", schema.text),
            fields.take("pattern", schema.text),
            fields.take("shape", schema.pair(schema.whole)),
            fields.take("zeros", schema.whole),
            fields.take("error", error),
            fields.take("seconds", schema.number),
            fields.take("output_error", error, None),
            fields.take("output_error_alone", error, None),
            fields.take("values_error", error, None),
            fields.take("correction", schema.optional(schema.mapping(schema.number)), None),
        )
        fields.skip("sparsity")
        fields.end()
        weights = layer.shape[0] * layer.shape[1]
        if not weights:
            fields.refuse("shape", "at least one weight", list(layer.shape))
        if layer.zeros > weights:
            fields.refuse("zeros", f"at most {weights}, all weights of shape {list(layer.shape)}", layer.zeros)
        return layer


@dataclass(kw_only=True)
class Report(BaseReport):
    """The result of `sparsekern.prune` with a method that makes weights zero.

    Attributes:
        layers: one entry for each pruned linear, in the order of the model.
        seconds: seconds of each phase: `capture` (embeddings, masks and the probe), `forward` (all passes through the blocks),
            `statistics`, `correct` (targets of linears), `solve`, `exchange` (between processes), `tune`, `distill`, `train` (`Gradual`),
            `write` (checkpoints and the final model) and `total`, which also holds the time of `allocation`.
        model_parameters: number of all weights of the model, pruned linears among them; 0 where it is not known.
        calibration_tokens: number of calibration tokens, without padding.
        resumed_blocks: number of blocks taken from a checkpoint. Their layers' seconds are those of the run that solved them.
        training: one entry for each optimizer step of a method that trains: the pruning `step`, the `sparsity`, the
            `learning_rate`, and the `loss` of the step's batch before it was trained on.
        tuning: one entry for each block that was tuned: its number `block`, the held-out errors `before` and `after`, the optimizer
            `steps` and the `seconds`.
        distillation: one entry for each evaluation of the distillation: the `step` in front of it, the `learning_rate` there, and the
            mean divergence `kl` of the held-out tokens from the dense model, in nats.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", 0.5, progress=False)
        >>> report.sparsity, report.layers[0].name
        (0.5, 'model.layers.0.self_attn.q_proj')
        >>> report.to_json("report.json")
        >>> sparsekern.Report.from_json("report.json") == report
        True
    """

    kind: ClassVar[str] = "blocks"

    layers: list[LayerReport] = field(default_factory=list)
    model_parameters: int = 0
    calibration_tokens: int = 0
    resumed_blocks: int = 0
    training: list[dict[str, float]] = field(default_factory=list)
    tuning: list[dict[str, float]] = field(default_factory=list)
    distillation: list[dict[str, float]] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of all pruned linears; 0 where no linear was pruned."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / weights if weights else 0.0

    @property
    def model_sparsity(self) -> float | None:
        """The share of zeros that the pruned linears have among all weights of the model; None where their number is not known."""
        return sum(layer.zeros for layer in self.layers) / self.model_parameters if self.model_parameters else None

    def summary(self) -> dict[str, float | str]:
        """Return the share of zeros in the pruned linears."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        zeros = f"{self.sparsity:.2%} of {weights / 1e6:,.1f} M weights in {len(self.layers)} layers"
        return {"zeros in the pruned linears": zeros, **self.stages()}

    def stages(self) -> dict[str, str]:
        """Return what each stage beside the method gained, and its seconds, in words by name: correction, tuning and distillation."""
        found: dict[str, tuple[str, str]] = {}  # with the phase that it took
        corrected = [layer.correction for layer in self.layers if layer.correction is not None]
        if corrected:
            inputs, residual, gain = (
                sum(own[name] for own in corrected) / len(corrected) for name in ("inputs", "residual", "gain")
            )
            of_residual = f", {residual:.2f} for the residual stream" if residual else ""
            text = f"{len(corrected)} linears corrected, mean share {inputs:.2f} for inputs{of_residual}, held-out error less by {gain:.3e}"
            found["correction"] = text, "correct"
        if self.tuning:
            before, after = (sum(block[name] for block in self.tuning) / len(self.tuning) for name in ("before", "after"))
            found["tuning"] = f"{len(self.tuning)} blocks tuned, mean held-out error from {before:.3e} to {after:.3e}", "tune"
        if self.distillation:
            start, end = self.distillation[0], self.distillation[-1]
            text = f"{end['step']:g} steps of distillation, held-out divergence from {start['kl']:.4f} to {end['kl']:.4f}"
            found["distillation"] = text, "distill"
        return {
            name: text + (f", {self.seconds[phase]:.1f} s" if phase in self.seconds else "")
            for name, (text, phase) in found.items()
        }

    def page(self) -> Page:
        """Return the content of the report's page."""
        perplexity, divergence, agreement = map(self.measured.get, ("perplexity, pruned", DIVERGENCE, AGREEMENT))
        total = self.seconds.get("total")
        return Page(
            self._facts(
                ("pattern", self.settings.get("pattern")),
                ("zeros in the pruned linears", f"{self.sparsity:.1%}"),
                ("zeros of all weights", None if self.model_sparsity is None else f"{self.model_sparsity:.1%}"),
                ("linears", len(self.layers)),
                ("calibration tokens", f"{self.calibration_tokens:,}" if self.calibration_tokens else None),
                ("perplexity", f"{perplexity:.4g}" if isinstance(perplexity, (int, float)) else None),
                (DIVERGENCE, f"{divergence:.4g} nats a token" if isinstance(divergence, (int, float)) else None),
                (AGREEMENT, f"{agreement:.1%} of top tokens" if isinstance(agreement, (int, float)) else None),
                ("seconds", None if total is None else f"{total:.1f}"),
            ),
            [
                perplexity_section(self.measured),
                size_section(self.size),
                lines_section(
                    "Error by layer",
                    by_block(((layer.name, layer.error) for layer in self.layers), ".3e"),
                    x_label="block",
                    note=ERROR_NOTE,
                    log=True,
                ),
                self._sparsity_section(),
                *self._training_sections(),
                seconds_section("Time by phase", self.seconds),
            ],
            table(f"All {len(self.layers)} linears", self.layers, COLUMNS),
            self.command,
            self.versions,
        )

    def _sparsity_section(self) -> Section:
        sparsities = [layer.sparsity for layer in self.layers]
        if not sparsities:
            return Section("Zeros by layer")
        if max(sparsities) - min(sparsities) < FLAT:
            return Section("Zeros by layer", note=f"{sparsities[0]:.1%} in every linear.")
        series = by_block(((layer.name, layer.sparsity) for layer in self.layers), ".2%")
        return lines_section("Zeros by layer", series, x_label="block", note="Share of each linear's weights.")

    def _training_sections(self) -> list[Section]:
        curve = [Point(entry["step"], entry["kl"], f"step {entry['step']:g}: {entry['kl']:.4f}") for entry in self.distillation]
        distilled = [lines_section("Distillation", {"divergence": curve}, x_label="step", note=DISTILLATION_NOTE)] if curve else []
        corrected = [
            lines_section(title, by_block(shares, ".2f"), x_label="block", note=CORRECTION_NOTE)
            for title, shares in self._shares_of_corrections().items()
        ]
        if not self.tuning:
            return [*corrected, *distilled]
        series = {
            name: [
                Point(block["block"], block[name], f"block {block['block']:g} {name}: {block[name]:.3e}") for block in self.tuning
            ]
            for name in ("before", "after")
        }
        tuned = lines_section("Error of blocks before and after tuning", series, x_label="block", note=TUNING_NOTE, log=True)
        return [*corrected, tuned, *distilled]

    def _shares_of_corrections(self) -> dict[str, list[tuple[str, float]]]:
        """Return name and share of each linear, by the title of their plot; without shares of zero."""
        titles = {"inputs": "Correction for inputs", "residual": "Correction for the residual stream"}
        corrections = [(layer.name, layer.correction) for layer in self.layers if layer.correction is not None]
        found = {title: [(name, own[kind]) for name, own in corrections if own[kind]] for kind, title in titles.items()}
        return {title: shares for title, shares in found.items() if shares}

    def _run(self) -> dict[str, object]:
        return {"calibration_tokens": self.calibration_tokens, "resumed_blocks": self.resumed_blocks}

    def _results(self) -> dict[str, object]:
        shares = {"sparsity": self.sparsity, "model_parameters": self.model_parameters, "model_sparsity": self.model_sparsity}
        return {**shares, "training": self.training, "tuning": self.tuning, "distillation": self.distillation}

    def _layers(self) -> list[dict[str, object]]:
        return [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers]

    @classmethod
    def _read(cls, run: Fields, results: Fields, layers: list[Fields]) -> dict[str, object]:
        results.skip("sparsity", "model_sparsity")
        return {
            "layers": [LayerReport.read(layer) for layer in layers],
            "model_parameters": results.take("model_parameters", schema.whole, 0),
            "calibration_tokens": run.take("calibration_tokens", schema.whole),
            "resumed_blocks": run.take("resumed_blocks", schema.whole),
            "training": results.take("training", schema.listing(schema.mapping(schema.number))),
            "distillation": results.take("distillation", schema.listing(schema.mapping(schema.number)), list[dict[str, float]]()),
            "tuning": results.take("tuning", schema.listing(schema.mapping(schema.number)), list[dict[str, float]]()),
        }

    def __str__(self) -> str:
        shown_as = starred(layer.name for layer in self.layers)
        rows: dict[tuple[str, str, tuple[int, int]], list[LayerReport]] = {}
        for layer in self.layers:
            rows.setdefault((shown_as[layer.name], layer.pattern, layer.shape), []).append(layer)
        width = max((len(name) for name, *_ in rows), default=5)
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'pattern':>7}  {'zeros':>7}  {'error':>9}  {'seconds':>7}"]
        for (name, pattern, shape), layers in rows.items():
            known = [layer.error for layer in layers if layer.error is not None]
            sparsity = sum(layer.sparsity for layer in layers) / len(layers)
            error, seconds = error_text(sum(known) / len(known) if known else None), sum(layer.seconds for layer in layers)
            size = f"{shape[0]} x {shape[1]}"
            row = f"{name:<{width}}  {size:>13}  {pattern:>7}  {sparsity:>7.2%}  {error:>9}  {seconds:>7.2f}"
            lines.append(row if len(layers) == 1 else f"{row}  ({len(layers)} experts, means)")
        errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
        if errors:
            alone = [layer.output_error_alone for layer in self.layers if layer.output_error_alone is not None]
            compared = f" (linear by linear {sum(alone) / len(alone):.3e})" if alone else ""
            mean = sum(errors) / len(errors)
            lines.append(f"{len(errors)} feed-forward networks, mean output error {mean:.3e}{compared}")
        if self.training:
            first, last = self.training[0]["loss"], self.training[-1]["loss"]
            lines.append(f"{len(self.training)} optimizer steps, loss of their batches from {first:.3f} to {last:.3f}")
        of_all = "" if self.model_sparsity is None else f", {self.model_sparsity:.2%} of all weights"
        lines += self.stages().values()
        lines.append(f"{len(self.layers)} layers, {self.sparsity:.2%} zeros{of_all}; seconds: {phases(self.seconds)}")
        return "\n".join(lines)
