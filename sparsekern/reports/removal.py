"""What a structured run did: how many heads and neurons each layer has left, and what that saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .report import Report


@dataclass(frozen=True)
class UnitsReport:
    """One sub-layer that was cut.

    `kind` is `"heads"` or `"neurons"`, `units` how many there were, `kept` how many are left; `error` the relative squared error of
    the residual stream behind the sub-layer over the calibration tokens, before its LayerNorm, with the errors of the sub-layers
    below; `seconds` the time to score, search and fit it.
    """

    name: str
    kind: str
    units: int
    kept: int
    error: float
    seconds: float


@dataclass
class StructuredReport(Report):
    """The result of `sparsekern.prune` with a method that removes whole units.

    `layers` holds a `UnitsReport` for each sub-layer. `flops` (the mean over the calibration samples) and `parameters` of the heads
    and neurons, and `model_parameters` of everything, are pairs of before and after. `seconds` by phase: `capture`, `score`,
    `search`, `tune`, `forward`, `write` and `total`.
    """

    layers: list[UnitsReport] = field(default_factory=list)
    flops: tuple[float, float] = (0.0, 0.0)
    parameters: tuple[int, int] = (0, 0)
    model_parameters: tuple[int, int] = (0, 0)

    @property
    def sparsity(self) -> float:
        """The share of the parameters of heads and neurons that is gone."""
        return 1 - self.parameters[1] / self.parameters[0]

    @property
    def flops_removed(self) -> float:
        """The share of the FLOPs of heads and neurons that is gone."""
        return 1 - self.flops[1] / self.flops[0]

    def to_dict(self) -> dict[str, object]:
        counts = {"flops": self.flops, "parameters": self.parameters, "model_parameters": self.model_parameters}
        return {"flops_removed": self.flops_removed, **counts, **super().to_dict()}

    def _layer_dict(self, layer: UnitsReport) -> dict[str, object]:
        return asdict(layer)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'units':<7}  {'kept':>13}  {'error':>9}  {'seconds':>7}"]
        for layer in self.layers:
            kept = f"{layer.kept} of {layer.units}"
            lines.append(f"{layer.name:<{width}}  {layer.kind:<7}  {kept:>13}  {layer.error:>9.3e}  {layer.seconds:>7.2f}")
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        before, after = self.model_parameters
        lines.append(
            f"{self.flops_removed:.2%} of the FLOPs and {self.sparsity:.2%} of the parameters of heads and neurons removed, "
            f"{before / 1e6:,.2f} M parameters in all became {after / 1e6:,.2f} M; seconds: {phases}"
        )
        return "\n".join(lines)
