"""Modes around a call of `prune` that would change its result or make it fail: they are undone within, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .process import PutBack

_default_dtype: PutBack[None, torch.dtype] = PutBack(
    lambda _: torch.get_default_dtype(), lambda _, dtype: torch.set_default_dtype(dtype)
)


@contextmanager
def plain_modes(model: nn.Module) -> Iterator[nn.Module]:
    """Undo inference mode, autocast, compilation, the default device and the default dtype within, and restore them.

    Yields:
        `model`, or the module that `torch.compile` wrapped in it; both have the same parameters.

    Raises:
        ValueError: see `check_modes`.
    """
    check_modes(model)
    model = getattr(model, "_orig_mod", model)
    devices = {"cpu"} | {parameter.device.type for parameter in model.parameters()}
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in sorted(devices):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_default_dtype.kept(None))
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
        stack.enter_context(_eager(model))
        yield model


def check_modes(model: nn.Module) -> None:
    """Raise unless a model can be changed here.

    Raises:
        ValueError: a tracer, fake tensors or a `torch.func` transform is active; weights were made in inference mode or have no
            values; `torch.compile` has wrapped a part of the model.
    """
    _refuse_tracers()
    model = getattr(model, "_orig_mod", model)
    _check_weights(model)
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"model: {name} is wrapped by torch.compile; prune the model before its parts are compiled")


def _refuse_tracers() -> None:
    """Raise `ValueError` if tensors have no values here."""
    found = None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        found = "a trace of torch.compile, torch.export or torch.jit"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        found = "a torch.func transform"
    elif torch._guards.detect_fake_mode() is not None:
        found = "FakeTensorMode"
    if found:
        raise ValueError(f"model: expected a call outside of {found}, whose tensors hold no values")


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"model: {name} was made under torch.inference_mode, so it cannot be changed; load the model outside of that mode"
            )
    parameters = list(model.parameters())
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise ValueError("model: all its weights are on the meta device; load them before pruning")


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run the uncompiled forwards within, since the loops watch forwards by hooks."""
    calls = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None}
    own_forwards = {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}
    forwards = {module: own for module, own in own_forwards.items() if hasattr(own, "_torchdynamo_orig_callable")}
    for module in calls:
        module._compiled_call_impl = None
    for module, own in forwards.items():
        module.forward = own._torchdynamo_orig_callable
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call
        for module, own in forwards.items():
            module.forward = own
