"""Find the feed-forward network of a block by what it computes, not by its names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .._activations import ACTIVATIONS, activate
from .linears import Linear


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The network `down(act(up(x)))`, or with a gate `down(act(gate(x)) * up(x))`; `activation` is a name of `sparsekern.ops`."""

    up: Linear
    gate: Linear | None
    down: Linear
    activation: str

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears, `down` last."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)


@dataclass(frozen=True)
class LinearCall:
    """The input and the output of one call of a linear, for a few tokens."""

    input: torch.Tensor
    output: torch.Tensor

    @property
    def source(self) -> tuple:
        """Where the input is stored: equal for linears that read the same tensor."""
        return self.input.data_ptr(), self.input.shape, self.input.stride()


def find_feed_forwards(calls: Mapping[Linear, LinearCall]) -> list[FeedForward]:
    """Return every feed-forward network among the linears of a block, at most one for each `down`.

    The input of each linear is compared with the activations, and gated activations, of the other linears' outputs.

    Args:
        calls: one call of each linear.
    """
    found = []
    for down, call in calls.items():
        hidden = _rows(call.input)
        tolerance = torch.finfo(hidden.dtype).eps ** 0.5  # several roundings to a half dtype, not another function
        candidates = [(_distance(made, hidden), rank, network) for rank, (made, network) in enumerate(_made(calls, down, hidden))]
        if candidates and min(candidates)[0] < tolerance:
            found.append(min(candidates)[2])
    return found


def _made(calls: Mapping[Linear, LinearCall], down: Linear, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, FeedForward]]:
    """Yield what each candidate network would have fed to `down`."""
    outputs = {linear: _rows(call.output).float() for linear, call in calls.items() if linear is not down}
    outputs = {linear: output for linear, output in outputs.items() if output.shape == hidden.shape}
    for name in ACTIVATIONS:
        for first, output in outputs.items():
            activated = activate(output, name)
            yield activated, FeedForward(first, None, down, name)
            for up, factor in outputs.items():
                if up is not first and calls[up].source == calls[first].source:
                    yield activated * factor, FeedForward(up, first, down, name)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _distance(made: torch.Tensor, hidden: torch.Tensor) -> float:
    hidden = hidden.float()
    return float((made - hidden).norm() / hidden.norm().clamp(min=torch.finfo(torch.float32).tiny))
