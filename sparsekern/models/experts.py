"""Find the fused experts of a mixture, and read each matrix of each expert as a linear.

Since version 5, transformers holds the experts of a layer in parameters of three dimensions, so no `nn.Linear` exists that a hook could
watch. Classes that are decorated with `use_experts_implementation` say how their matrices are stored: with a gate or without, with
biases, transposed, gate and up one behind the other or interleaved. Llama 4 and DBRX have layouts of their own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

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
        index: `[rows, k]` int64, the experts that each row is routed to; a number outside `0 .. count - 1` is no expert.
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


class InterfaceExperts(Experts):
    """Experts of a class that is decorated with transformers' `use_experts_implementation`."""

    module: Any

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        if not self.module.has_gate:
            self.parts = (UP, DOWN)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether the module has the attributes that the decorator sets, and the parameters that it speaks of."""
        known = all(isinstance(getattr(module, flag, None), bool) for flag in ("has_gate", "is_transposed", "has_bias"))
        if not known:
            return False
        names = ("gate_up_proj" if cast(Any, module).has_gate else UP, DOWN)
        return all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in names)

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        return (self.module,)

    def parameter(self, part: str) -> nn.Parameter:
        return self.module._parameters[self.stored_name(part)]

    def view(self, part: str, stored: torch.Tensor) -> torch.Tensor:
        return self._rows_of(part, stored.transpose(1, 2) if self.module.is_transposed else stored, 1)

    def stacked_bias(self, part: str) -> torch.Tensor | None:
        if not self.module.has_bias:
            return None
        return self._rows_of(part, self.module._parameters[f"{self.stored_name(part)}_bias"].detach(), 1)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
        given = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments.values()
        hidden, index, weights, *_ = given
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return ExpertsCall(hidden, index.reshape(len(hidden), -1), weights.reshape(len(hidden), -1), len(hidden))

    def gated(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        if gate is None:
            return self.module.act_fn(up)
        joined = torch.cat((gate, up), -1) if self.module.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self.module._apply_gate(joined)

    def finished(self, output: torch.Tensor) -> torch.Tensor:
        return self.module.post_expert_norm(output) if getattr(self.module, "has_post_expert_norm", False) else output

    def stored_name(self, part: str) -> str:
        return "gate_up_proj" if part != DOWN and self.module.has_gate else part

    def is_transposed(self, part: str) -> bool:
        return bool(self.module.is_transposed)

    def _rows_of(self, part: str, stacked: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the rows of `part` in what is stored for gate and up together."""
        if part == DOWN or not self.module.has_gate:
            return stacked
        index = 0 if part == GATE else 1
        if self.module.is_concatenated:
            return stacked.chunk(2, dim)[index]
        return stacked[:, index::2]


class UndecoratedExperts(InterfaceExperts):
    """Experts that store and call as the decorated classes do, gate in front of up, and lack the decorator (Step 3.7, LongCat)."""

    parts = (GATE, UP, DOWN)

    def __init__(self, name: str, module: nn.Module) -> None:
        Experts.__init__(self, name, module)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether the module has parameters of these names and shapes, and the arguments of decorated experts."""
        both, down = (module._parameters.get(name) for name in ("gate_up_proj", DOWN))
        if both is None or down is None or both.ndim != 3 or down.ndim != 3:
            return False
        fitting = both.shape[1:] == (2 * down.shape[2], down.shape[1]) and set(module._parameters) == {"gate_up_proj", DOWN}
        arguments = list(inspect.signature(module.forward).parameters)
        return fitting and arguments == ["hidden_states", "top_k_index", "top_k_weights"] and hasattr(module, "act_fn")

    def view(self, part: str, stored: torch.Tensor) -> torch.Tensor:
        return stored if part == DOWN else stored.chunk(2, 1)[0 if part == GATE else 1]

    def stacked_bias(self, part: str) -> None:
        return None

    def stored_name(self, part: str) -> str:
        return DOWN if part == DOWN else "gate_up_proj"

    def is_transposed(self, part: str) -> bool:
        return True

    def parameter(self, part: str) -> nn.Parameter:
        return self.module._parameters[self.stored_name(part)]

    def gated(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        assert gate is not None
        apply = getattr(self.module, "_apply_gate", None)
        return self.module.act_fn(gate) * up if apply is None else apply(torch.cat((gate, up), -1))

    def combined(self, call: ExpertsCall) -> torch.Tensor:
        total = super().combined(call)
        if hasattr(self.module, "identity_expert"):  # LongCat's experts beyond `count` return their inputs
            total += call.hidden * (call.weights * (call.index >= self.count)).sum(1, keepdim=True)
        return total

    def finished(self, output: torch.Tensor) -> torch.Tensor:
        return output


class Llama4Experts(Experts):
    """Experts of Llama 4, which are called with every token scaled by its routing weight, expert by expert, zero where not routed."""

    module: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether the module is of Llama 4's class."""
        return type(module).__name__ == "Llama4TextExperts"

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        return (self.module,)

    def stored_name(self, part: str) -> str:
        return DOWN if part == DOWN else "gate_up_proj"

    def is_transposed(self, part: str) -> bool:
        return True

    def parameter(self, part: str) -> nn.Parameter:
        return self.module._parameters[self.stored_name(part)]

    def view(self, part: str, stored: torch.Tensor) -> torch.Tensor:
        stacked = stored.transpose(1, 2)
        return stacked if part == DOWN else stacked.chunk(2, 1)[0 if part == GATE else 1]

    def call(self, args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
        (hidden,) = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments.values()
        hidden = hidden.reshape(-1, hidden.shape[-1])
        tokens = len(hidden) // self.count
        expert = torch.arange(self.count, device=hidden.device).repeat_interleave(tokens)
        index = torch.where((hidden != 0).any(1), expert, self.count)[:, None]
        return ExpertsCall(hidden, index, hidden.new_ones(len(hidden), 1), tokens)

    def gated(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        return up * self.module.act_fn(gate)


class DbrxExperts(Experts):
    """Experts of DBRX, whose matrices are stored one below the other in an inner module, down transposed."""

    module: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether the module is of DBRX's class."""
        return type(module).__name__ == "DbrxExperts"

    @property
    def count(self) -> int:
        return self.module.num_experts

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        return (self.module.mlp,)

    def stored_name(self, part: str) -> str:
        return {GATE: "w1", UP: "v1", DOWN: "w2"}[part]

    def is_transposed(self, part: str) -> bool:
        return part == DOWN

    def parameter(self, part: str) -> nn.Parameter:
        return self.module.mlp._parameters[self.stored_name(part)]

    def view(self, part: str, stored: torch.Tensor) -> torch.Tensor:
        stacked = stored.view(self.count, -1, stored.shape[-1])
        return stacked.transpose(1, 2) if part == DOWN else stacked

    def call(self, args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
        hidden, index, weights = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments.values()
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return ExpertsCall(hidden, index.reshape(len(hidden), -1), weights.reshape(len(hidden), -1), len(hidden))

    def gated(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        assert gate is not None
        return self.module.mlp.activation_fn(gate) * up


KINDS: tuple[Any, ...] = (InterfaceExperts, Llama4Experts, DbrxExperts, UndecoratedExperts)


def experts_of(name: str, module: nn.Module) -> Experts | None:
    """Return the fused experts that `module` holds, or None for any other module."""
    return next((kind(name, module) for kind in KINDS if kind.fits(module)), None)


def find_experts(root: nn.Module, prefix: str = "") -> list[Experts]:
    """Return the fused experts under `root` in the model's order.

    Args:
        root: a model or a part of one.
        prefix: name of `root` in its model, put before each name.
    """
    found = (experts_of(name, module) for name, module in root.named_modules(prefix=prefix))
    return [experts for experts in found if experts is not None]


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
