"""Cut experts out of a mixture, so that the rest is an ordinary, smaller model.

What depends on the number of experts is not looked up by name. The model's own class is built without weights from a config with fewer
experts. Each tensor and each number that then differs is what has to be cut: experts, router rows, correction biases, counters. So a
plain `from_pretrained` fits the result, and what the class does in an unknown way is refused before any weight is touched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .expert_layouts import DbrxExperts, find_experts
from .experts import Experts
from .linears import is_unread, mark_unread
from .listed_experts import ListedExperts, find_listed
from .streaming import refuse_streamed, stream_of

COUNTED = re.compile(r"(^|_)experts?($|_)")  # in names of config settings
NOT_COUNTED = re.compile(r"per_tok|top|shared|active|layer|size|dim")


@dataclass(frozen=True)
class Mixture:
    """The mixture of one layer.

    Attributes:
        experts: the experts.
        owner: name of the module that holds experts and router.
        groups: number of groups of consecutive experts, of which a token's router chooses some; 1 for no groups.
        chosen_groups: number of groups that a token's experts may come from.
        further: number of choices of the router, behind the experts, that are no experts. They stay.
    """

    experts: Experts | ListedExperts
    owner: str
    groups: int = 1
    chosen_groups: int = 1
    further: int = 0


Change = Callable[[torch.Tensor, int, Mixture], torch.Tensor]


@dataclass
class Cut:
    """What changes in a model when its mixtures have fewer experts.

    Attributes:
        mixtures: the mixtures, each of which keeps `left` experts.
        left: number of experts that stay in each.
        model: the model.
        count: number of experts in each before.
        tensors: owner of the tensor, its name there, the dimension along which it is cut, and its mixture.
        numbers: module or config, name and new value.
    """

    mixtures: list[Mixture]
    left: int
    model: nn.Module
    count: int
    tensors: list[tuple[nn.Module, str, int, Mixture]] = field(default_factory=list)
    numbers: list[tuple[Any, str, int]] = field(default_factory=list)

    def apply(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Cut the model in place. Blocks of a streamed model are cut whenever they are read.

        Args:
            kept: ascending numbers of the experts that stay, `[left]` int64, by the name of the experts.
        """

        def choose(tensor: torch.Tensor, dim: int, mixture: Mixture) -> torch.Tensor:
            each, further = self._places(tensor.shape[dim], mixture)
            rows = (kept[mixture.experts.name].cpu()[:, None] * each + torch.arange(each)).flatten()
            rows = torch.cat((rows, torch.arange(self.count * each, self.count * each + further)))
            return tensor.index_select(dim, rows.to(tensor.device))

        self._stream(choose)
        self._cut(choose)
        for experts in self._listed():
            experts.keep(kept[experts.name].tolist())
        for owner, name, value in self.numbers:
            setattr(owner, name, value)

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Keep some experts of each mixture within, by views that take no memory, and restore the model afterwards.

        They are the first ones, or the last where more is behind them.
        """

        def narrow(tensor: torch.Tensor, dim: int, mixture: Mixture) -> torch.Tensor:
            each, further = self._places(tensor.shape[dim], mixture)
            return tensor.narrow(dim, (self.count - self.left) * each if further else 0, self.left * each + further)

        tensors = [_tensor(module, name) for module, name, _, _ in self.tensors]
        numbers = [getattr(owner, name) for owner, name, _ in self.numbers]
        lists = [(experts.module._modules, dict(experts.module._modules)) for experts in self._listed()]
        try:
            self._stream(narrow)
            self._cut(narrow)
            for experts in self._listed():
                experts.keep(range(self.left))
            for owner, name, value in self.numbers:
                setattr(owner, name, value)
            yield
        finally:
            self._stream(None)
            for (module, name, _, _), tensor in zip(self.tensors, tensors, strict=True):
                _put(module, name, tensor)
            for held, modules in lists:
                held.clear()
                held.update(modules)
            for (owner, name, _), value in zip(self.numbers, numbers, strict=True):
                setattr(owner, name, value)

    def _places(self, size: int, mixture: Mixture) -> tuple[int, int]:
        """Return how many places each expert has along an axis of this size, and how many are behind those of all experts."""
        further = mixture.further if size == self.count + mixture.further else 0
        return (size - further) // self.count, further

    def _listed(self) -> list[ListedExperts]:
        return [mixture.experts for mixture in self.mixtures if isinstance(mixture.experts, ListedExperts)]

    def _cut(self, change: Change, modules: Container[nn.Module] | None = None) -> None:
        """Replace tensors of all modules, or of some, by what `change` makes of them."""
        for module, name, dim, mixture in self.tensors:
            if modules is None or module in modules:
                _put(module, name, change(_tensor(module, name).detach(), dim, mixture))

    def _stream(self, change: Change | None) -> None:
        """Let a streamed model change the blocks that it reads; None ends that."""
        stream = stream_of(self.model)
        for index, name in enumerate(stream.blocks if stream else ()):
            inside = set(self.model.get_submodule(name).modules()).intersection(module for module, _, _, _ in self.tensors)
            if stream and inside:
                stream.edit(self.model, index, None if change is None else self._cutting(change, inside))

    def _cutting(self, change: Change, modules: Container[nn.Module]) -> Callable[[int], None]:
        return lambda index: self._cut(change, modules)


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """Return the mixtures of a model, whose layers all have equally many experts.

    Raises:
        ValueError: no experts, experts of an unknown layout, layers of different numbers of experts, or experts that are modules of
            their own in a streamed model.
    """
    found = []
    for experts in _experts_in(model):
        owner = experts.name.rpartition(".")[0]
        groups, chosen = (_number_in(model.get_submodule(owner), name) for name in ("num_group", "topk_group"))
        found.append(Mixture(experts, owner, groups, chosen, experts.further))
    if not found:
        raise ValueError(
            "model: expected a mixture of experts, in parameters of three dimensions or in a list of modules, got "
            f"{type(model).__name__}, where none was found"
        )
    if any(isinstance(mixture.experts, ListedExperts) for mixture in found):
        refuse_streamed(model, "whose experts are modules of their own")
    for mixture in found:
        if mixture.experts.count != found[0].experts.count:
            raise ValueError(
                f"model: expected equally many experts in each layer, since the config has one number; got "
                f"{found[0].experts.count} in {found[0].experts.name} and {mixture.experts.count} in {mixture.experts.name}"
            )
    return found


def plan_cut(model: nn.Module, mixtures: list[Mixture], left: int) -> Cut:
    """Return what has to be cut so that each mixture keeps `left` experts. The model is unchanged.

    Raises:
        ValueError: no number in the config decides how many experts there are, or something that depends on it is not understood.
    """
    count, config = mixtures[0].experts.count, getattr(model, "config", None)
    settings = [path for path in _counts(config, count) if _decides(model, path, left, mixtures)]
    if not settings:
        raise ValueError(f"model: found no number in the config of {type(model).__name__} that makes {count} experts {left}")
    smaller = _built(model, settings, left)
    cut = Cut(mixtures, left, model, count)
    gone = tuple(f"{experts.name}.{name}." for experts in cut._listed() for name in list(experts.members)[left:])
    for module_name, module in model.named_modules(remove_duplicate=False):
        if f"{module_name}.".startswith(gone):
            continue
        other = smaller.get_submodule(module_name)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor):
                _compare(cut, module_name, module, name, tensor, _tensor(other, name))
        for name, value in vars(module).items():
            if type(value) is int and type(wanted := getattr(other, name, None)) is int and value != wanted:
                cut.numbers.append((module, name, wanted))
    _refuse_tables(model, cut)
    cut.numbers += [(_config_at(config, path), path[-1], left) for path in settings]
    return cut


def _compare(cut: Cut, module_name: str, module: nn.Module, name: str, tensor: Any, other: Any) -> None:
    """Note that a tensor has to be cut if it is smaller with fewer experts."""
    if other is None or tensor.shape == other.shape:
        return
    whole = f"{module_name}.{name}".strip(".")
    owners = [mixture for mixture in cut.mixtures if whole.startswith(f"{mixture.owner}.") or not mixture.owner]
    different = [dim for dim, sizes in enumerate(zip(tensor.shape, other.shape, strict=False)) if sizes[0] != sizes[1]]
    sizes = [(tensor.shape[dim], other.shape[dim]) for dim in different]
    one_below_another = any(module in mixture.experts.holders for mixture in owners if isinstance(mixture.experts, DbrxExperts))
    rows = len(tensor) // cut.count if one_below_another else 1
    further = max((mixture.further for mixture in owners), default=0)
    expected = [[(cut.count * rows + behind, cut.left * rows + behind)] for behind in {0, further}]
    if tensor.dim() != other.dim() or sizes not in expected or not owners:
        raise ValueError(
            f"model: {whole} depends on the number of experts in an unknown way: {tuple(tensor.shape)} becomes {tuple(other.shape)}"
        )
    cut.tensors.append((module, name, different[0], max(owners, key=lambda mixture: len(mixture.owner))))


def _refuse_tables(model: nn.Module, cut: Cut) -> None:
    """Raise `ValueError` if a router may hold indices of experts, which removal would change."""
    for mixture in cut.mixtures:
        for name, tensor in (*(owner := model.get_submodule(mixture.owner)).named_parameters(), *owner.named_buffers()):
            if not tensor.is_floating_point() and tensor.numel() > 1:
                raise ValueError(f"model: {mixture.owner}.{name} may hold indices of experts, which removal cannot renumber")


def _experts_in(model: nn.Module) -> list[Experts | ListedExperts]:
    """Return all experts of a model, fused or in lists, in its order."""
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found: list[Experts | ListedExperts] = [*find_experts(model), *find_listed(model)]
    return sorted(found, key=lambda experts: places[experts.name])


def _number_in(module: nn.Module, name: str) -> int:
    """Return an attribute of a module or of one inside it; 1 where none has it."""
    found = (vars(inner).get(name) for inner in module.modules())
    return next((value for value in found if type(value) is int and value > 0), 1)


def _counts(config: Any, count: int) -> Iterator[tuple[str, ...]]:
    """Yield the path of each setting in a config and the configs inside it that may be the number of experts."""
    for name, value in vars(config).items() if config is not None else ():
        if type(value) is int and value == count and COUNTED.search(name) and not NOT_COUNTED.search(name):
            yield (name,)
        elif hasattr(value, "to_dict"):
            yield from ((name, *path) for path in _counts(value, count))


def _config_at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path[:-1]:
        config = getattr(config, name)
    return config


def _decides(model: nn.Module, path: tuple[str, ...], left: int, mixtures: list[Mixture]) -> bool:
    """Return whether a setting changes the number of any experts."""
    modules = dict(_built(model, [path], left).named_modules())
    return any(_count_in(modules[mixture.experts.name], mixture.experts) == left for mixture in mixtures)


def _count_in(module: nn.Module, experts: Experts | ListedExperts) -> int:
    """Return how many experts a module holds that stands for that of `experts` in a smaller model without weights."""
    if isinstance(experts, ListedExperts):
        return sum(name in module._modules for name in experts.members)
    return type(experts)(experts.name, module).count


def _built(model: nn.Module, paths: list[tuple[str, ...]], left: int) -> nn.Module:
    """Return a model of the same class without weights, with `left` for these settings."""
    config = copy.deepcopy(model.config)
    for path in paths:
        setattr(_config_at(config, path), path[-1], left)
    make: Any = type(model)
    try:
        with torch.device("meta"):
            return make(config)
    except Exception as error:
        raise ValueError(f"model: {type(model).__name__} cannot be built with {left} experts: {error}") from error


def _tensor(module: nn.Module, name: str) -> Any:
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of another of the same kind."""
    if name not in module._parameters:
        module._buffers[name] = tensor
        return
    old = module._parameters[name]
    new = (
        tensor
        if isinstance(tensor, nn.Parameter)
        else nn.Parameter(tensor, requires_grad=bool(old is not None and old.requires_grad))
    )
    if old is not None and is_unread(old):
        mark_unread(new)
    module._parameters[name] = new
