"""What a run did: every layer's pattern, sparsity, error and time, and where the seconds went."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .._files import write_atomically
from .html import html_page


@dataclass(frozen=True)
class LayerReport:
    """One pruned linear.

    `sparsity` is the share of zeros in its weight; `error` the relative squared output error over the calibration tokens,
    `tr((Ŵ-W) G (Ŵ-W)^T) / tr(W G W^T)` with the undamped Gram matrix `G` of its inputs and `Ŵ` as it is stored in the model (None
    where no Gram matrix was taken); `seconds` the time to solve it, with the factorisation where it was the first to need it.

    Where a whole feed-forward network was solved together, its last linear holds the relative squared error of the network's output
    as `output_error`, and as `output_error_alone` what the same solver reaches linear by linear; `seconds` are then equal shares.
    """

    name: str
    pattern: str
    shape: tuple[int, int]
    zeros: int
    error: float | None
    seconds: float
    output_error: float | None = None
    output_error_alone: float | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.shape[0] * self.shape[1])

    @classmethod
    def from_dict(cls, fields: dict) -> LayerReport:
        """From what `dataclasses.asdict` and JSON made of it."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})


@dataclass
class Report:
    """The result of `sparsekern.prune`.

    `seconds` by phase: `capture` (embeddings, masks and the probe), `forward` (both passes through the blocks), `statistics`,
    `solve`, `write` (checkpoints and the final model) and `total`. `settings` holds the method, the seed and the versions.
    `training`, where the method trains, has an entry for each optimizer step: the pruning `step`, the `sparsity`, the `learning_rate` and
    the `loss` of its batch before it was trained on. `resumed_blocks` counts the blocks taken from a checkpoint; their layers' seconds are those of the run that solved them.
    `bytes` is there where the model was saved: `dense`, its weights in memory, and `saved`, its weight files.
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    calibration_tokens: int = 0
    resumed_blocks: int = 0
    training: list[dict[str, float]] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of all pruned linears."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    def to_dict(self) -> dict[str, object]:
        return {
            "sparsity": self.sparsity,
            "calibration_tokens": self.calibration_tokens,
            "resumed_blocks": self.resumed_blocks,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "settings": self.settings,
            **({"training": self.training} if self.training else {}),
            "layers": [self._layer_dict(layer) for layer in self.layers],
        }

    def _layer_dict(self, layer: LayerReport) -> dict[str, object]:
        return {**asdict(layer), "sparsity": layer.sparsity}

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything as JSON; the file is there whole or not at all."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())

    def to_html(self, path: str | os.PathLike) -> None:
        """Write a page with plots of it, in one file; it is there whole or not at all."""
        write_atomically(Path(path), html_page(self.to_dict()).encode())

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'pattern':>7}  {'zeros':>7}  {'error':>9}  {'seconds':>7}"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            error = "-" if layer.error is None else f"{layer.error:.3e}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>13}  {layer.pattern:>7}  {layer.sparsity:>7.2%}  {error:>9}  {layer.seconds:>7.2f}"
            )
        together = [layer for layer in self.layers if layer.output_error is not None]
        if together:
            error, alone = (
                sum(getattr(t, name) for t in together) / len(together) for name in ("output_error", "output_error_alone")
            )
            lines.append(f"{len(together)} feed-forward networks, mean output error {error:.3e} (linear by linear {alone:.3e})")
        if self.training:
            first, last = self.training[0]["loss"], self.training[-1]["loss"]
            lines.append(f"{len(self.training)} optimizer steps, loss of their batches from {first:.3f} to {last:.3f}")
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        lines.append(f"{len(self.layers)} layers, {self.sparsity:.2%} zeros; seconds: {phases}")
        return "\n".join(lines)
