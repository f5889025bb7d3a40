"""One interface to linears: `nn.Linear`, the `Conv1D` of GPT-2, whose weight is stored transposed, and the matrices of fused experts."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from .expert_layouts import experts_of
from .experts import ExpertLinear

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D
    from typing_extensions import TypeIs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = 0.05  # relative difference of two outputs that is taken for rounding
PLAIN_SUBCLASSES = ("FalconLinear",)  # subclasses of nn.Linear that only multiply


@dataclass(frozen=True, eq=False)
class Linear:
    """One weight matrix of a model.

    Attributes:
        name: name of the first module in the model.
        modules: the modules that multiply by it; several where a weight is shared. That of an expert is an `ExpertLinear`.
    """

    name: str
    modules: tuple[nn.Module, ...]

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, a view of the model's own storage; writing to it writes to the model."""
        return linear_weight(self.modules[0])

    @property
    def bias(self) -> torch.Tensor | None:
        """`[out_features]`, or None."""
        bias = self.modules[0].bias
        return bias.detach() if isinstance(bias, torch.Tensor) else None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stores the weight; that of an expert stores the weights of its whole layer."""
        module = self.modules[0]
        return module.parameter if isinstance(module, ExpertLinear) else module.get_parameter("weight")

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        """The modules of the model that own the parameter."""
        module = self.modules[0]
        return module.experts.holders if isinstance(module, ExpertLinear) else self.modules

    @property
    def key(self) -> Hashable:
        """The identity of the matrix: two linears with equal keys are one matrix."""
        module = self.modules[0]
        if isinstance(module, ExpertLinear):
            return id(module.parameter), module.expert, module.part
        return id(self.parameter)

    def part_of(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the entries of `stored`, which is laid out as the parameter, that belong to this matrix.

        Those of a linear of its own are all of them, in the layout of the parameter; those of an expert `[out_features, in_features]`.
        """
        module = self.modules[0]
        return module.experts.view(module.part, stored)[module.expert] if isinstance(module, ExpertLinear) else stored

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def features(self) -> int:
        """Number of inputs."""
        return self.weight.shape[1]


def find_linears(root: nn.Module, prefix: str = "") -> list[Linear]:
    """Return the linears under `root` in the model's order; modules that share one weight are one entry.

    Each matrix of each fused expert is an entry of its own, such as `model.layers.3.mlp.experts.17.down_proj`.

    Args:
        root: a model or a part of one.
        prefix: name of `root` in its model, put before each linear's name.

    Raises:
        ValueError: a weight is not a plain float matrix (quantised, parametrised, on the meta device).
    """
    owners: dict[Hashable, list[tuple[str, nn.Module]]] = {}
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            _check_prunable(name, module)
            owners.setdefault(id(module._parameters["weight"]), []).append((name, module))
        elif (experts := experts_of(name, module)) is not None:
            for part in experts.parts:
                _check_values(f"{name} ({part})", experts.parameter(part), (2, 3))
            for own_name, linear in experts.linears():
                owners[own_name] = [(own_name, linear)]
    return [Linear(found[0][0], tuple(module for _, module in found)) for found in owners.values()]


def mark_unread(weight: torch.Tensor) -> None:
    """Mark a weight without values that a streamed model reads when it is needed."""
    weight.sparsekern_unread = True  # type: ignore[attr-defined]


def is_unread(weight: torch.Tensor) -> bool:
    """Return whether a weight has no values because it is of a streamed model, which reads it when it is needed."""
    return weight.is_meta and getattr(weight, "sparsekern_unread", False)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight of a linear as `[out_features, in_features]`, a view of the model's own storage."""
    if isinstance(module, ExpertLinear):
        return module.weight
    parameter = module.get_parameter("weight")
    weight = parameter.detach()
    return weight.T if is_conv1d(module) else weight


def is_conv1d(module: nn.Module) -> TypeIs[Conv1D]:
    """Return whether the module is the `Conv1D` of transformers."""
    # Looked up rather than imported: where transformers is not loaded, no module can be one of its classes.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Return whether the module only multiplies, so that another kind of layer can replace it.

    Unknown subclasses of `nn.Linear` do not qualify: some compute more, and of some the owner reads the weight itself (the `out_proj`
    of attention).
    """
    kind = type(module)
    return kind is nn.Linear or is_conv1d(module) or (issubclass(kind, nn.Linear) and kind.__name__ in PLAIN_SUBCLASSES)


def multiplies(linear: Linear, x: torch.Tensor, output: object) -> bool:
    """Return whether `output` is, up to rounding, the product of `x` and the weight of a linear, with its bias."""
    if not isinstance(output, torch.Tensor) or output.shape != (*x.shape[:-1], linear.shape[0]) or x.shape[-1] != linear.features:
        return False
    product = nn.functional.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype)).float()
    difference, size = float((product - output.float()).norm()), float(output.float().norm())
    return difference <= CLOSE * size or not bool(output.isfinite().all())


def _check_prunable(name: str, module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(f"{name}: its weight is computed from other tensors (a parametrisation); remove that before pruning")
    _check_values(name, weight, (2,))


def _check_values(name: str, weight: torch.Tensor, dims: Sequence[int]) -> None:
    """Raise `ValueError` unless a weight has values of a known dtype, and one of these numbers of dimensions."""
    if weight.is_meta and not is_unread(weight):
        raise ValueError(f"{name}: its weight is on the meta device; load the model's weights before pruning")
    if weight.dim() not in dims or weight.dtype not in DTYPES:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: expected a float32, bfloat16 or float16 matrix, got {dtype} {tuple(weight.shape)}; prune before quantising"
        )
