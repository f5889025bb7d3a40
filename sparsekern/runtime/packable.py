"""What `pack` can pack: linears, and the fused parameters of experts, each with its places in the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from ..models.expert_layouts import experts_of
from ..models.experts import Experts
from ..models.globs import Globs, as_globs, check_matches, matches
from ..models.linears import is_conv1d, is_plain_linear, is_unread, linear_weight
from ..models.scaled_weights import check_undivided
from .formats import INT8
from .joined_weights import joined_in_files
from .packed_weight import DTYPES, PackedWeight
from .sparse_experts import FORWARDS, PREFIX, PackedExperts, SparseExperts, matrices_of, pack_experts, unpack_experts
from .sparse_linear import SparseLinear

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
Places = list[tuple[nn.Module, str]]  # all parents of one module, and its name in each


class Packable(ABC):
    """A weight that is packed as a whole.

    Attributes:
        name: name of its module or parameter in the model.
    """

    name: str

    @property
    @abstractmethod
    def packed(self) -> PackedWeight | None:
        """The packed weight, None where it is dense."""

    @property
    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The dense weight, unpacked if necessary."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weight."""

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """Its parameter where it is dense."""

    @property
    @abstractmethod
    def parameter_name(self) -> str:
        """Name of its parameter in the model where it is dense."""

    @property
    @abstractmethod
    def packed_name(self) -> str:
        """Name of its module in the model where it is packed."""

    @abstractmethod
    def made(self, format: str) -> PackedWeight:
        """Return the packed weight. The model is unchanged.

        Raises:
            ValueError: the weight does not fit the format.
        """

    @abstractmethod
    def put(self, format: str | None) -> None:
        """Pack the weight in `format`, or unpack it for None."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices that it holds, as `prune` names them."""
        return (self.name,)

    @abstractmethod
    def why_not(self, owners: Mapping[int, int]) -> str | None:
        """Return the reason why it cannot be packed, or None if it can be or is packed.

        Args:
            owners: the number of modules that have a parameter, by its id.
        """

    @abstractmethod
    def has_hooks(self) -> bool:
        """Return whether packing or unpacking would lose hooks. accelerate's are hidden in a forward of the instance."""

    @property
    def is_unread(self) -> bool:
        """True if it has no values because it is of a streamed model."""
        return self.packed is None and is_unread(self.parameter)

    def is_packed_as(self, format: str) -> bool:
        """Return whether it is packed in `format` already, in any format for `"packed"`."""
        return self.packed is not None and format in ("packed", self.packed.format)


class PackableLinear(Packable):
    """A linear, at one or more places of a model."""

    def __init__(self, name: str, places: Places) -> None:
        self.name, self.places = name, places

    @property
    def module(self) -> nn.Module:
        """The linear, dense or packed."""
        parent, child = self.places[0]
        return parent.get_submodule(child)

    @property
    def packed(self) -> SparseLinear | None:
        return module if isinstance(module := self.module, SparseLinear) else None

    @property
    def dense(self) -> torch.Tensor:
        return self.packed.dense_weight() if self.packed is not None else linear_weight(self.module)

    @property
    def device(self) -> torch.device:
        return self.packed.device if self.packed is not None else self.module.get_parameter("weight").device

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter("weight")

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def packed_name(self) -> str:
        return self.name

    def made(self, format: str) -> SparseLinear:
        linear = self.packed.to_linear() if self.packed is not None else self.module
        try:
            return SparseLinear.from_linear(linear, format)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def put(self, format: str | None) -> None:
        if format is not None:
            linear: nn.Module = self.made(format)
        else:
            linear = self.packed.to_linear() if self.packed is not None else self.module
        for parent, child in self.places:
            parent._modules[child] = linear

    def why_not(self, owners: Mapping[int, int]) -> str | None:
        linear = self.module
        if isinstance(linear, SparseLinear):
            return None
        weight = linear._parameters.get("weight")
        if weight is None:
            return "the weight is computed from other tensors"
        if not is_plain_linear(linear):
            return f"{type(linear).__name__} may do more than multiply"
        return why_not_parameter(weight, owners)

    def has_hooks(self) -> bool:
        return is_hooked(self.module)


class PackableExperts(Packable):
    """A parameter that holds a matrix of all experts of a layer, gate and up together in most models."""

    def __init__(self, experts: Experts, holder: nn.Module, path: str, parts: tuple[str, ...]) -> None:
        self.experts, self.holder, self.parts = experts, holder, parts
        self.child = experts.stored_name(parts[0])
        self.name = f"{path}.{self.child}" if path else self.child
        self.count = self.packed.shape[0] if self.packed is not None else experts.count
        self.transposed = experts.is_transposed(parts[0])

    @property
    def packed(self) -> SparseExperts | None:
        return found if isinstance(found := self.holder._modules.get(PREFIX + self.child), SparseExperts) else None

    @property
    def dense(self) -> torch.Tensor:
        return self.packed.dense_weight() if self.packed is not None else self._matrices()

    @property
    def device(self) -> torch.device:
        return self.packed.device if self.packed is not None else self.holder.get_parameter(self.child).device

    @property
    def parameter(self) -> nn.Parameter:
        return self.holder.get_parameter(self.child)

    @property
    def parameter_name(self) -> str:
        return self.name

    @property
    def packed_name(self) -> str:
        owner, dot, own = self.name.rpartition(".")
        return f"{owner}{dot}{PREFIX}{own}"

    def made(self, format: str) -> SparseExperts:
        try:
            return SparseExperts.of(self.holder.get_parameter(self.child), self.count, self.transposed, format)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def put(self, format: str | None) -> None:
        if self.packed is not None:
            unpack_experts(self.holder, self.child, self.experts.module)
        if format is not None:
            pack_experts(self.experts, self.holder, self.child, self.made(format))

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(self.experts.linear_name(i, part) for i in range(self.count) for part in self.parts)

    def why_not(self, owners: Mapping[int, int]) -> str | None:
        if self.packed is not None:
            return None
        if type(self.experts) not in FORWARDS:
            return f"{type(self.experts.module).__name__} has a forward of its own"
        if getattr(self.experts.module, "_is_expert_parallel", False):
            return "the experts are spread over several devices"
        return why_not_parameter(self.holder.get_parameter(self.child), owners)

    def has_hooks(self) -> bool:
        return "forward" in vars(self.experts.module) or "forward" in vars(self.holder)

    def _matrices(self) -> torch.Tensor:
        return matrices_of(self.holder.get_parameter(self.child).detach(), self.count, self.transposed)


def why_not_parameter(weight: torch.Tensor, owners: Mapping[int, int]) -> str | None:
    """Return the reason why a parameter cannot be packed, or None if it can be."""
    if weight.dtype not in DTYPES:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}, expected float32, bfloat16 or float16"
    return "the weight is shared with another module" if owners[id(weight)] > 1 else None


def _has_8_bits(known: Packable) -> bool:
    """Return whether this is a head in 8 bits, which a format for other weights leaves as it is."""
    return known.packed is not None and known.packed.format == INT8


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear, dense or packed."""
    return isinstance(module, (nn.Linear, SparseLinear)) or is_conv1d(module)


def find_packables(model: nn.Module, *, only_packed: bool = False) -> dict[str, Packable]:
    """Return the linears and the parameters of experts by name, whether they can be packed or not.

    Args:
        model: the model.
        only_packed: leave out what is dense.
    """
    places: dict[int, PackableLinear] = {}
    found: list[Packable] = []
    for parent_name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module is not None and is_linear(module) and getattr(module, "owns_tensors", True):
                name = f"{parent_name}.{child}" if parent_name else child
                if id(module) not in places:
                    found.append(places.setdefault(id(module), PackableLinear(name, [])))
                places[id(module)].places.append((parent, child))
        if (experts := _experts_of(parent_name, parent)) is not None:
            found += parameters_of_experts(experts)
    return {known.name: known for known in found if not only_packed or known.packed is not None}


def parameters_of_experts(experts: Experts) -> list[PackableExperts]:
    """Return the parameters that hold the matrices of experts, dense or packed."""
    names = dict.fromkeys(map(experts.stored_name, experts.parts))
    (holder,) = experts.holders
    path = next(name for name, module in experts.module.named_modules(prefix=experts.name) if module is holder)
    return [
        PackableExperts(experts, holder, path, tuple(part for part in experts.parts if experts.stored_name(part) == name))
        for name in names
    ]


def _experts_of(name: str, module: nn.Module) -> Experts | None:
    """Return the fused experts that a module is, dense or packed, or None."""
    if isinstance(module, PackedExperts):
        return next((kind(name, module) for kind, forward in FORWARDS.items() if isinstance(module, forward)), None)
    return experts_of(name, module)


def dense_packables(model: nn.Module) -> dict[str, Packable]:
    """Return by name the dense weights of a model that can be packed, whether they are in memory or not."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {name: known for name, known in find_packables(model).items() if known.packed is None and known.why_not(owners) is None}


def chosen_packables(model: nn.Module, include: Globs, exclude: Globs) -> dict[str, Packable]:
    """Return what `pack` considers, by name.

    Raises:
        ValueError: there is nothing, it is offloaded, or a glob matches nothing; or the model divides weights in place.
    """
    check_undivided(model)
    include, exclude = as_globs("include", include), as_globs("exclude", exclude)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    found = find_packables(model)
    why_not = {name: known.why_not(owners) for name, known in found.items()}
    linears = [name for name, known in found.items() if isinstance(known, PackableLinear)]
    why_not |= dict.fromkeys(joined_in_files(model, linears), "transformers joins it with other weights in files")
    packable = {name: known for name, known in found.items() if why_not[name] is None and not _has_8_bits(known)}
    if not packable:
        raise ValueError(_nothing_to_pack(model, Counter(reason for reason in why_not.values() if reason is not None)))
    aliases = {name: dict.fromkeys((name, *known.matrices)) for name, known in packable.items()}
    everything = [alias for known in aliases.values() for alias in known]
    check_matches("include", include, everything)
    check_matches("exclude", exclude, everything)

    def meant(name: str, globs: list[str]) -> bool:
        return any(matches(alias, globs) for alias in aliases[name])

    chosen = {
        name: known
        for name, known in packable.items()
        if (include is None or meant(name, include)) and not (exclude and meant(name, exclude))
    }
    if not chosen:
        raise ValueError(f"include, exclude: together they leave none of the {len(packable)} linear layers to pack")
    for known in chosen.values():
        check_not_offloaded(known)
    return chosen


def _nothing_to_pack(model: nn.Module, reasons: Mapping[str, int]) -> str:
    if not reasons:
        hint = "; SparseLinear.from_linear packs one layer" if is_linear(model) else ""
        return f"model: expected linear layers, got a {type(model).__name__} without any{hint}"
    counted = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    return f"model: none of its {sum(reasons.values())} linear layers can be packed ({counted})"


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, or a forward of its own, which a module in its place would not have."""
    return any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module)


def check_no_hooks(known: Packable, change: str) -> None:
    """Raise `ValueError` if packing or unpacking would lose hooks."""
    if known.has_hooks():
        hint = ", or leave it out with exclude" if change == "packing" else ""
        raise ValueError(f"{known.name}: expected no hooks, since {change} would lose them; remove them first{hint}")


def check_not_offloaded(known: Packable) -> None:
    """Raise `ValueError` for a weight that is not in memory."""
    if known.device.type == "meta" and not known.is_unread:
        raise ValueError(f"{known.name}: expected a weight in memory, got an offloaded one, which is not supported")
