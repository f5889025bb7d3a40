"""`keep_sparsity`: keep the zeros of a pruned model at zero through any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._counts import nonzeros
from ..models import Linear, find_linears
from ..models.globs import Globs, as_globs, check_matches, matches
from ..models.streaming import refuse_streamed


def keep_sparsity(model: nn.Module, *, include: Globs = None, exclude: Globs = None) -> SparsityKeeper:
    """Keep the weights of `model` that are zero now at zero during training.

    Two guards work together. The gradient of a kept zero is set to zero as soon as it is accumulated, so it affects neither clipping
    nor momentum. After each step of a `torch.optim.Optimizer`, the weights that it stepped are masked, which undoes earlier momentum,
    weight decay and noise. Nothing is added to the model: parameters, state dictionary, copies and saved files stay the same, and
    `torch.compile` sees the plain model.

        with sparsekern.keep_sparsity(model):
            train(model)                                   # any loop, any optimizer, gradient accumulation, GradScaler, …

        trainer = transformers.Trainer(model, …, callbacks=[sparsekern.keep_sparsity(model)])

        with sparsekern.keep_sparsity(model):              # merging a LoRA adapter writes to the weights: they are masked on leaving
            model = peft_model.merge_and_unload()

    The guards stay until the guarded modules are freed, `remove()` is called or the `with` block ends.

    Other optimizers, and those that write back float32 copies of the weights, are seen only through the masked gradients. These keep
    zeros at zero unless the optimizer already had momentum; call `apply()` after its step to be certain. Each process must hold the
    whole weights: `DistributedDataParallel` does, sharded parameters do not.

    Args:
        model: a pruned model, or any module with pruned linears.
        include: names or globs of the linears to guard. None guards every linear that has a zero, but leaves out those that are all
            zero (the fresh half of a LoRA adapter) and those whose weight is also an embedding's.
        exclude: names or globs of linears to leave unguarded.

    Returns:
        A `SparsityKeeper`, which is a context manager and serves as a `transformers.TrainerCallback`. It holds one byte (a bool) for
        each weight of the guarded linears.

    Raises:
        TypeError: `model` is not a module, or `include` or `exclude` holds something other than names.
        ValueError: no linear has a zero, or a glob matches no linear.

    Example:
        >>> report = sparsekern.prune(model, "magnitude", "50%", progress=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with sparsekern.keep_sparsity(model) as keeper:
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step()
        >>> keeper.sparsity
        0.5
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module with pruned linears, got {type(model).__name__}")
    refuse_streamed(model, "whose weights are not kept")
    linears = find_linears(model)
    include, exclude = as_globs("include", include), as_globs("exclude", exclude)
    for argument, globs in (("include", include), ("exclude", exclude)):
        check_matches(argument, globs, [linear.name for linear in linears])
    guarded = [linear for linear in linears if matches(linear.name, include)] if include is not None else _pruned(model, linears)
    chosen = [linear for linear in guarded if not matches(linear.name, exclude)]
    if not chosen:
        raise ValueError(f"model: expected linears with zeros to keep, found none in {type(model).__name__}; prune it first")
    return SparsityKeeper(chosen)


@dataclass(eq=False)
class _Guard:
    """One parameter and its zeros. Its module is referenced weakly, so that guarding it does not keep it alive.

    Attributes:
        module: the owner of the parameter.
        attribute: the parameter's name in the module.
        zeros: bool, in the layout of the parameter.
        parts: the zeros of each guarded linear by name, views of `zeros`; those of fused experts share a parameter.
    """

    module: weakref.ref[nn.Module]
    attribute: str
    zeros: torch.Tensor
    parts: dict[str, torch.Tensor]

    @property
    def weight(self) -> torch.Tensor | None:
        module = self.module()
        return None if module is None else module.get_parameter(self.attribute)

    def mask_(self, values: torch.Tensor) -> None:
        if self.zeros.device != values.device:
            self.zeros = self.zeros.to(values.device)
        values.detach().masked_fill_(self.zeros, 0)


class SparsityKeeper:
    """The guards that `keep_sparsity` returns; a context manager and a `transformers.TrainerCallback`.

    Attributes:
        names: the guarded linears.
        sparsity: share of their weights that is kept at zero.
    """

    def __init__(self, linears: list[Linear], masks: Mapping[str, torch.Tensor] | None = None) -> None:
        """Guard `linears`.

        Args:
            linears: what to guard.
            masks: as the property `masks` returns them; None takes the current zeros.
        """
        by_parameter: dict[int, list[Linear]] = {}
        for linear in linears:
            by_parameter.setdefault(id(linear.parameter), []).append(linear)
        self._guards = [self._guard(sharing, masks) for sharing in by_parameter.values()]
        self.names = tuple(linear.name for linear in linears)
        guarded = [part for guard in self._guards for part in guard.parts.values()]
        self.sparsity = sum(int(zeros.sum()) for zeros in guarded) / sum(zeros.numel() for zeros in guarded)
        self._handles = [register_optimizer_step_post_hook(self._after_step)]
        for guard in self._guards:
            if (parameter := guard.weight) is not None and parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_gradient_hook(guard)))

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """By linear name: bool, True where a weight may be non-zero.

        A mask is in the layout of its parameter; that of an expert is `[out_features, in_features]`.
        """
        return {name: ~zeros for guard in self._guards for name, zeros in guard.parts.items()}

    def apply(self) -> None:
        """Set the kept zeros to zero now; needed only after the step of an optimizer that hooks do not reach."""
        for guard in self._guards:
            if (weight := guard.weight) is not None:
                guard.mask_(weight)

    def remove(self) -> None:
        """Mask the weights one last time and remove the guards; may be called again."""
        self.apply()
        self._let_go()

    def __enter__(self) -> SparsityKeeper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def on_step_end(self, *arguments: object, **keywords: object) -> None:
        """Mask the weights before a `transformers.Trainer` evaluates or saves the model."""
        self.apply()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):  # the other events of a TrainerCallback, those of later versions too
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"SparsityKeeper({len(self.names)} linears, {self.sparsity:.2%} of their weights kept at zero)"

    def _guard(self, sharing: list[Linear], masks: Mapping[str, torch.Tensor] | None) -> _Guard:
        """Return the guard of the parameter that these linears are parts of."""
        parameter, owner = sharing[0].parameter, sharing[0].holders[0]
        weights = parameter.detach()
        zeros = torch.zeros_like(weights, dtype=torch.bool)
        parts = {linear.name: linear.part_of(zeros) for linear in sharing}
        for linear in sharing:
            own = linear.part_of(weights) == 0 if masks is None else ~masks[linear.name].to(weights.device)
            parts[linear.name].copy_(own)
        attribute = next(name for name, held in owner._parameters.items() if held is parameter)
        return _Guard(weakref.ref(owner, self._module_gone), attribute, zeros, parts)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        # Only what this optimizer has changed: another's step may come between a forward and a backward, which forbids writing.
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for guard in self._guards:
            if (weight := guard.weight) is not None and id(weight) in stepped:
                guard.mask_(weight)

    def _module_gone(self, module: weakref.ref[nn.Module]) -> None:
        self._guards = [guard for guard in self._guards if guard.module is not module]
        if not self._guards:
            self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._guards = [], []


def _gradient_hook(guard: _Guard) -> Callable[[torch.Tensor], None]:
    def mask_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            guard.mask_(parameter.grad)

    return mask_gradient


def _nothing(*arguments: object, **keywords: object) -> None:
    """Ignore an event of a `transformers.TrainerCallback`."""


def _pruned(model: nn.Module, linears: list[Linear]) -> list[Linear]:
    """Return the linears with some zeros, whose weights no other module shares."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(module)
    found = []
    for linear in linears:
        if owners[id(linear.parameter)] <= set(linear.holders):
            kept = int(nonzeros(linear.weight))
            if 0 < kept < linear.weight.numel():
                found.append(linear)
    return found
