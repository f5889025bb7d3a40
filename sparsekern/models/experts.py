"""The fused experts of one layer of a mixture: each matrix of each expert as a linear, and the calls of the layer.

How their matrices are stored is in `expert_layouts`, which finds them in a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class ExpertLinear(nn.Module):
    """One matrix of one expert: a view of the fused parameter, which it does not own.

    It belongs to no model's modules. Its weight is read from the fused module at each use, so it follows a move to another device.

    Attributes:
        experts: the experts that it is one of.
        expert: the number of the expert.
        part: `"gate_proj"`, `"up_proj"` or `"down_proj"`.
    """

    experts: Experts

    def __init__(self, experts: Experts, expert: int, part: str) -> None:
        super().__init__()
        self.experts, self.expert, self.part = experts, expert, part

    @property
    def parameter(self) -> nn.Parameter:
        """The fused parameter that the matrix is a part of."""
        return self.experts.parameter(self.part)

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, a view of the fused parameter; writing to it writes to the model."""
        return self.experts.weight(self.expert, self.part)

    @property
    def bias(self) -> torch.Tensor | None:
        """`[out_features]`, a view of the fused biases; None where there are none."""
        return self.experts.bias(self.expert, self.part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x weight^T + bias`."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class ExpertsCall:
    """The arguments of one call of fused experts.

    Attributes:
        hidden: `[rows, hidden]`. Row `r` is token `r % tokens` of the call.
        index: `[rows, k]` int64, the experts that each row is routed to; a number outside `0 .. count - 1` is not an expert.
        weights: `[rows, k]`, the routing weights, which scale the experts' outputs.
        tokens: the number of tokens.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    tokens: int

    def by_expert(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for each of `count` experts the rows that are routed to it, ascending, and their routing weights."""
        valid = (self.index >= 0) & (self.index < count)
        chosen = torch.where(valid, self.index, count).flatten()
        order = chosen.argsort(stable=True)
        sizes = torch.bincount(chosen, minlength=count + 1).tolist()[:count]
        rows, weights = order // self.index.shape[1], self.weights.flatten()[order]
        used = sum(sizes)
        return list(zip(rows[:used].split(sizes), weights[:used].split(sizes), strict=True))


class Experts(ABC):
    """The fused experts of one layer.

    Attributes:
        name: the name of the module in the model.
        module: the module that is called with hidden states and routing.
        parts: the matrices of an expert, in the order of their use.
    """

    parts: tuple[str, ...] = (GATE, UP, DOWN)

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    @property
    def count(self) -> int:
        """The number of experts."""
        return self.stacked(DOWN).shape[0]

    @property
    def further(self) -> int:
        """The number of choices of the router, behind the experts, that are no experts: they return their inputs (LongCat)."""
        return self.stacked(self.parts[0]).shape[0] - self.count

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return self.parameter(DOWN).device

    @abstractmethod
    def parameter(self, part: str) -> nn.Parameter:
        """Return the parameter that holds `part` of all experts."""

    @abstractmethod
    def stored_name(self, part: str) -> str:
        """Return the name that the parameter of `part` has in its holder."""

    @abstractmethod
    def is_transposed(self, part: str) -> bool:
        """Return whether the parameter of `part` holds each matrix as `[in_features, out_features]`."""

    @abstractmethod
    def view(self, part: str, stored: torch.Tensor) -> torch.Tensor:
        """Return `part` of all experts, `[count, out_features, in_features]`, in a tensor that is laid out as its parameter."""

    def stacked(self, part: str) -> torch.Tensor:
        """Return `part` of all experts, `[count, out_features, in_features]`, a view of its parameter."""
        return self.view(part, self.parameter(part).detach())

    def stacked_bias(self, part: str) -> torch.Tensor | None:
        """Return the biases of `part` of all experts, `[count, out_features]`, a view of their parameter; None without biases."""
        return None

    @property
    @abstractmethod
    def holders(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters hold the matrices."""

    def weight(self, expert: int, part: str) -> torch.Tensor:
        """Return one matrix, `[out_features, in_features]`, a view of its parameter."""
        return self.stacked(part)[expert]

    def bias(self, expert: int, part: str) -> torch.Tensor | None:
        """Return the bias of one matrix, `[out_features]`, a view of its parameter; None where there is none."""
        biases = self.stacked_bias(part)
        return None if biases is None else biases[expert]

    def linear(self, expert: int, part: str) -> ExpertLinear:
        """Return one matrix as a module."""
        return ExpertLinear(self, expert, part)

    def linear_name(self, expert: int, part: str) -> str:
        """Return the name of one matrix, such as `model.layers.3.mlp.experts.17.down_proj`."""
        return f"{self.name}.{expert}.{part}"

    def linears(self) -> Iterator[tuple[str, ExpertLinear]]:
        """Yield the name and the module of each matrix, expert by expert."""
        for expert in range(self.count):
            for part in self.parts:
                yield self.linear_name(expert, part), self.linear(expert, part)

    @abstractmethod
    def call(self, args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
        """Return the arguments of a call of the module."""

    @abstractmethod
    def gated(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the down projection from the outputs of the others; `gate` is None where there is no gate."""

    def finished(self, output: torch.Tensor) -> torch.Tensor:
        """Return what a routing weight scales, from the outputs of the down projection."""
        return output

    def down_inputs(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return the inputs of an expert's down projection, `[rows, intermediate]`, for its inputs `x` `[rows, hidden]`."""
        gate = self.linear(expert, GATE)(x) if GATE in self.parts else None
        return self.gated(gate, self.linear(expert, UP)(x))

    def combined(self, call: ExpertsCall) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs, `[rows, hidden]`, which the module returns for this call."""
        total = torch.zeros_like(call.hidden)
        for expert, (rows, weights) in enumerate(call.by_expert(self.count)):
            if len(rows):
                output = self.output(expert, call.hidden[rows]) * weights[:, None]
                total.index_add_(0, rows, output.to(total.dtype))
        return total

    def output(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return an expert's output, `[rows, hidden]`, before the routing weight scales it, for its inputs `x` `[rows, hidden]`."""
        return self.finished(self.linear(expert, DOWN)(self.down_inputs(expert, x)))


@contextmanager
def watched(found: Iterable[Experts], visit: Callable[[Experts, ExpertsCall], object]) -> Iterator[None]:
    """Call `visit` with the arguments of every call of these experts within, before the experts run themselves."""

    def hook(experts: Experts) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            visit(experts, experts.call(args, kwargs))

        return before

    with ExitStack() as stack:
        for experts in found:
            stack.callback(experts.module.register_forward_pre_hook(hook(experts), with_kwargs=True).remove)
        yield
