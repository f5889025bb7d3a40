"""What became of a model that met one data set after another: perplexities after each, their average, and what was forgotten."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .._files import write_atomically
from .html import continual_page


@dataclass
class Step:
    """One data set taken in.

    `changed` is the share of the pruned linears' weights that are zero now and were not after the step before, or the reverse (None
    at the first step); `perplexity` that of the model after this step, by data set.
    """

    name: str
    tokens: int
    sparsity: float
    changed: float | None
    seconds: float
    perplexity: dict[str, float] = field(default_factory=dict)


@dataclass
class ContinualReport:
    """The result of `sparsekern.prune_continually`.

    `steps` are all data sets that the state has seen, in their order, this call's last; `dense` the perplexities of the dense model.
    """

    settings: dict[str, object] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    @property
    def matrix(self) -> list[list[float | None]]:
        """`R[t][i]`: the perplexity on data set `i` after step `t`, None where it was not taken (always where `i > t`)."""
        return [[step.perplexity.get(name) for name in self.names] for step in self.steps]

    @property
    def average_perplexity(self) -> float | None:
        """The mean over all data sets of the perplexity after the last step; None where one is missing."""
        return _mean(self.matrix[-1]) if self.steps else None

    @property
    def backward_transfer(self) -> float | None:
        """The mean over all data sets but the last, `T`, of `R[i, i] - R[T, i]`, in perplexity.

        **Negative: forgetting.** Positive: data sets that came later made the model better on earlier ones. It is the sign of Lopez-Paz
        and Ranzato (2017), for whom higher is better too, with perplexity instead of accuracy. None where a perplexity is missing or
        there is one data set only.
        """
        table, last = self.matrix, len(self.steps) - 1
        pairs = [(table[i][i], table[last][i]) for i in range(last)]
        return _mean([None if None in pair else pair[0] - pair[1] for pair in pairs])

    def to_dict(self) -> dict[str, object]:
        return {
            "settings": self.settings,
            "names": self.names,
            "dense": self.dense,
            "perplexity": self.matrix,
            "average_perplexity": self.average_perplexity,
            "backward_transfer": self.backward_transfer,
            "backward_transfer_sign": "mean of R[i, i] - R[T, i]; negative is forgetting",
            "steps": [asdict(step) for step in self.steps],
        }

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything as JSON; the file is there whole or not at all."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())

    def to_html(self, path: str | os.PathLike) -> None:
        """Write a page with the perplexities as a plot and a table; the file is there whole or not at all."""
        write_atomically(Path(path), continual_page(self.to_dict()).encode())

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
    return sum(values) / len(values) if values and None not in values else None
