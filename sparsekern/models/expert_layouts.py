"""Find the fused experts of a mixture, by the layouts that are known.

Since version 5, transformers holds the experts of a layer in parameters of three dimensions, so no `nn.Linear` exists that a hook could
watch. Classes that are decorated with `use_experts_implementation` say how their matrices are stored: with a gate or without, with
biases, transposed, gate and up one behind the other or interleaved. Llama 4 and DBRX have layouts of their own.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn

from .experts import DOWN, GATE, UP, Experts, ExpertsCall


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
