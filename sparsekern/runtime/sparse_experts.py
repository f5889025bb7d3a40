"""`SparseExperts`: the weights of all experts of a layer, packed, and the forward of experts that multiplies by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..models.expert_layouts import DbrxExperts, InterfaceExperts, Llama4Experts
from ..models.experts import Experts
from .expert_formats import ExpertsFormat, experts_format_of
from .lazy_weight import LazyWeight
from .packed_weight import PackedWeight

PREFIX = "packed_"  # of a packed parameter's name. transformers' conversions of parameters must not match the packed tensors


class SparseExperts(PackedWeight):
    """The weights `[experts, out_features, in_features]` of all experts in a packed format.

    It replaces a parameter of the module of experts, which keeps the biases. Gradients flow to the input and the bias.

    Attributes:
        format: name of the packed format, such as `"bitmask"`.
        shape: `(experts, out_features, in_features)`.
        stored: shape of the parameter that this replaces.
        transposed: whether that parameter holds each weight as `[in_features, out_features]`.
    """

    layout: ExpertsFormat

    def __init__(
        self,
        format: str,
        shape: tuple[int, int, int],
        tensors: dict[str, torch.Tensor],
        *,
        stored: torch.Size,
        transposed: bool,
        trainable: bool = True,
    ) -> None:
        """Make it from packed tensors, whose contents only `check` checks; `of` packs a parameter.

        Raises:
            ValueError: the format is unknown, has other tensors, or `shape` is not that of experts.
        """
        experts_format_of(format).check_shape(shape)
        super().__init__(format, shape, tensors, trainable=trainable)
        self.stored, self.transposed = torch.Size(stored), transposed

    @classmethod
    def of(cls, parameter: torch.Tensor, count: int, transposed: bool, format: str) -> SparseExperts:
        """Pack the parameter of all experts, which is not changed.

        Args:
            parameter: `[experts, out_features, in_features]`; `[experts, in_features, out_features]` if transposed. The first two axes
                may be one.
            count: number of experts.
            transposed: whether the matrices are stored transposed.
            format: `"bitmask"`, or `"N:M"` with M of at most 16.

        Raises:
            TypeError: its dtype cannot be packed.
            ValueError: the format is unknown, or a weight does not fit it.
        """
        weight = matrices_of(parameter.detach(), count, transposed)
        tensors = experts_format_of(format).pack(weight)
        shape = (weight.shape[0], weight.shape[1], weight.shape[2])
        return cls(format, shape, tensors, stored=parameter.shape, transposed=transposed, trainable=parameter.requires_grad)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape of the parameter that this replaces."""
        return self.stored

    def as_stored(self) -> torch.Tensor:
        """Unpack the weights in the layout of the parameter that this replaces."""
        weight = self.dense_weight()
        weight = weight.transpose(1, 2).contiguous() if self.transposed else weight
        return weight.view(self.stored)

    def to_parameter(self) -> nn.Parameter:
        """Return the dense parameter that this replaces."""
        return nn.Parameter(self.as_stored(), requires_grad=self.trainable)

    def forward(self, x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply each row of `x` by the weights of its experts.

        Args:
            x: `[tokens, in_features]` of the weights' dtype, or of another under autocast.
            experts: `[tokens, choices]` int64.
            bias: `[experts, out_features]`, or None.

        Returns:
            `[tokens, choices, out_features]`.

        Raises:
            TypeError: `x` has another dtype.
            ValueError: `x` has other features, or an id names no expert.
        """
        x, tensors = self.cast(x), self.tensors
        if x.dtype != self.dtype:
            raise TypeError(f"x: expected {self.dtype}, the dtype of the packed values, got {x.dtype}")
        if x.shape[-1] != self.shape[2]:
            raise ValueError(f"x: expected {self.shape[2]} input features, got {x.shape[-1]}")
        return self.layout.multiply(x, experts, tensors, bias)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        count, rows, columns = self.shape
        return f"experts={count}, in_features={columns}, out_features={rows}, format={self.format}, density={self.density:.1%}"


def matrices_of(parameter: torch.Tensor, count: int, transposed: bool) -> torch.Tensor:
    """Return a parameter of experts as `[experts, out_features, in_features]`, a view; see `SparseExperts.of`."""
    stacked = parameter.view(count, -1, parameter.shape[-1]) if parameter.dim() == 2 else parameter
    return stacked.transpose(1, 2) if transposed else stacked


class PackedExperts(nn.Module):
    """Experts of which some parameters are packed: base of the classes that `packed_class` makes.

    The module stays the same object, with its own activation, gate and biases. `forward` does not depend on transformers' choice of an
    implementation of experts.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute; a packed parameter is unpacked, for models that read it."""
        packed = self.__dict__.get("_modules", {}).get(PREFIX + name)
        return LazyWeight.of(packed) if isinstance(packed, SparseExperts) else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how copies and pickles are made: the class is not found by its name."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        forward, kind = type(self).__bases__
        return _new, (forward, kind), state


class PackedInterfaceExperts(PackedExperts):
    """The forward of classes that are decorated with `use_experts_implementation`."""

    def forward(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the experts of each token, `[tokens, hidden]`."""
        tokens, choices = top_k_index.shape
        first = "gate_up_proj" if self.has_gate else "up_proj"
        bias = getattr(self, f"{first}_bias") if self.has_bias else None
        up = multiply(self, first, self.is_transposed, hidden_states, top_k_index, bias).flatten(0, 1)
        up = self._apply_gate(up) if self.has_gate else self.act_fn(up)
        bias = self.down_proj_bias if self.has_bias else None
        down = multiply(self, "down_proj", self.is_transposed, up, top_k_index.reshape(-1, 1), bias).flatten(0, 1)
        if getattr(self, "has_post_expert_norm", False):
            down = self.post_expert_norm(down)
        return (down.view(tokens, choices, -1) * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


class PackedLlama4Experts(PackedExperts):
    """The forward of the experts of Llama 4, which is given each token once for each expert, zero where it is not routed there."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the experts, `[experts * tokens, hidden]`."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = (hidden != 0).any(1).nonzero().squeeze(1)  # the output of a zero is zero, since there are no biases
        experts = (rows // (len(hidden) // self.num_experts)).unsqueeze(1)
        gate, up = multiply(self, "gate_up_proj", True, hidden[rows], experts, None).squeeze(1).chunk(2, -1)
        down = multiply(self, "down_proj", True, up * self.act_fn(gate), experts, None).squeeze(1)
        return torch.zeros_like(hidden).index_copy(0, rows, down.to(hidden.dtype))


class PackedDbrxExperts(PackedExperts):
    """The forward of the experts of DBRX, whose parameters are held by an inner module."""

    def forward(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the experts of each token, in the shape that DBRX's own forward has."""
        hidden = hidden_states.reshape(-1, self.hidden_size)
        tokens, choices = top_k_index.shape
        count = self.num_experts
        gate = multiply(self.mlp, "w1", False, hidden, top_k_index, None, count)
        up = multiply(self.mlp, "v1", False, hidden, top_k_index, None, count)
        up = (self.mlp.activation_fn(gate) * up).flatten(0, 1)
        down = multiply(self.mlp, "w2", True, up, top_k_index.reshape(-1, 1), None, count)
        states = (down.view(tokens, choices, -1) * top_k_weights.unsqueeze(-1)).sum(1).to(hidden.dtype)
        return states.view(len(hidden_states), -1, self.hidden_size)


FORWARDS: dict[type[Experts], type[PackedExperts]] = {
    InterfaceExperts: PackedInterfaceExperts,
    Llama4Experts: PackedLlama4Experts,
    DbrxExperts: PackedDbrxExperts,
}


_classes: dict[tuple[type[PackedExperts], type[nn.Module]], Any] = {}


def packed_class(forward: type[PackedExperts], kind: type[nn.Module]) -> Any:
    """Return the class of modules of class `kind` with packed parameters, the same each time."""
    if (forward, kind) not in _classes:
        text = f"`{kind.__name__}` with packed weights."
        _classes[forward, kind] = type(f"Packed{kind.__name__}", (forward, kind), {"__doc__": text})
    return _classes[forward, kind]


def _new(forward: type[PackedExperts], kind: type[nn.Module]) -> Any:
    made = packed_class(forward, kind)
    return made.__new__(made)


def multiply(
    holder: Any,
    name: str,
    transposed: bool,
    x: torch.Tensor,
    experts: torch.Tensor,
    bias: torch.Tensor | None,
    count: int | None = None,
) -> torch.Tensor:
    """Multiply each row of `x` by its experts: `[tokens, choices, out_features]`.

    Args:
        holder: module that holds the parameter, packed or dense.
        name: name of the parameter.
        transposed: whether it holds the matrices transposed.
        x: `[tokens, in_features]`.
        experts: `[tokens, choices]` int64.
        bias: `[experts, out_features]`, or None.
        count: number of experts; None: the size of the parameter's first axis.
    """
    packed = holder._modules.get(PREFIX + name)
    if packed is not None:
        product: torch.Tensor = packed(x, experts, bias)
        return product
    weights = holder._parameters[name]
    weights = matrices_of(weights, count or len(weights), transposed)
    y = x.new_empty((*experts.shape, weights.shape[1]))
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        y = y.index_put((token, choice), linear(x[token], weights[expert], None if bias is None else bias[expert]).to(y.dtype))
    return y


def pack_experts(experts: Experts, holder: nn.Module, name: str, packed: SparseExperts) -> None:
    """Replace a dense or packed parameter of experts."""
    if name in holder._parameters:
        del holder._parameters[name]
    holder._modules[PREFIX + name] = packed
    become(experts.module, FORWARDS[type(experts)])
    if holder is not experts.module:
        become(holder, PackedExperts)


def become(module: nn.Module, forward: type[PackedExperts]) -> None:
    """Give a module the class with this forward, once."""
    if not isinstance(module, PackedExperts):
        module.__class__ = packed_class(forward, type(module))


def unpack_experts(holder: nn.Module, name: str, module: nn.Module) -> None:
    """Put the dense parameter back. A module of which nothing is packed gets its own class again.

    Args:
        holder: module that holds the packed parameter.
        name: name of the parameter.
        module: the module of experts; `holder` itself, or around it.
    """
    packed = holder._modules.pop(PREFIX + name)
    assert isinstance(packed, SparseExperts)
    holder._parameters[name] = packed.to_parameter()
    for known in (holder, module):
        if isinstance(known, PackedExperts) and not any(isinstance(part, SparseExperts) for part in known.modules()):
            known.__class__ = type(known).__bases__[1]
