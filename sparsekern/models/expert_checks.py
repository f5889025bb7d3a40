"""Checks of fused experts: layouts that are not known, and modules that compute something else than their layout says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .expert_layouts import find_experts
from .experts import Experts, ExpertsCall, watched
from .unsupported import CannotFollow

CLOSE = 0.05  # relative difference of two outputs that is taken for rounding
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unknown_experts(root: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the modules under `root` that stack matrices, are called experts, and have no known layout, by name."""
    known = {holder for experts in find_experts(root, prefix) for holder in (experts.module, *experts.holders)}

    def is_called_so(name: str, module: nn.Module) -> bool:
        stacks = [own for own, parameter in module._parameters.items() if parameter is not None and parameter.dim() > 2]
        stacks = [] if isinstance(module, CONVOLUTIONS) else stacks
        words = (name.removeprefix(prefix), type(module).__name__, *stacks)
        return bool(stacks) and any("expert" in word.lower() for word in words)

    found = root.named_modules(prefix=prefix)
    return {name: module for name, module in found if module not in known and is_called_so(name, module)}


@contextmanager
def verified(found: Iterable[Experts]) -> Iterator[None]:
    """Compare, at every call of these experts within, the sum of the experts' outputs with the output of their module.

    Raises:
        ValueError: they differ by more than rounding, so the module computes something else than was read from its layout.
    """
    calls: dict[str, ExpertsCall] = {}

    def check(experts: Experts) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple, output: object) -> None:
            call = calls.pop(experts.name)
            if not isinstance(output, torch.Tensor) or not _is_close(experts.combined(call), output.reshape(call.hidden.shape)):
                raise CannotFollow(
                    f"model: {experts.name} ({type(module).__name__}) computes something else than its layout says, so the inputs of "
                    "its down projections are unknown; leave it out with exclude"
                )

        return after

    with ExitStack() as stack:
        for experts in found:
            stack.callback(experts.module.register_forward_hook(check(experts)).remove)
        stack.enter_context(watched(found, lambda experts, call: calls.update({experts.name: call})))
        yield


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two outputs differ by rounding alone. Values that are not finite are left to the statistics."""
    difference, size = float((ours.float() - theirs.float()).norm()), float(theirs.float().norm())
    return difference <= CLOSE * size or not bool(theirs.isfinite().all())
