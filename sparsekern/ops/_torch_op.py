"""Behaviour of ordinary torch ops: gradients or a refusal, version counters, autocast, checks for shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ._memory import check_memory

PLAIN = (torch.Tensor, torch.nn.Parameter)
LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


class Gradients(NamedTuple):
    """The gradients of an op with one result.

    Attributes:
        to: arguments that have a gradient; any other argument that requires one is refused.
        saved: tensors that `formula` needs.
        formula: returns gradients by name. Its arguments are the saved tensors and all non-tensor arguments by name, the shapes of all
            tensors by name, the gradient of the result, and the names of the wanted gradients.
    """

    to: tuple[str, ...]
    saved: tuple[str, ...]
    formula: Callable[[Mapping[str, object], Mapping[str, torch.Size], torch.Tensor, set[str]], dict[str, torch.Tensor]]


def complete(op: torch._ops.OpOverload, gradients: Gradients | None, on_cuda: Callable | None = None) -> Callable:
    """Register autograd, version counters and autocast for `op`, and return the function that its wrapper calls.

    The registered kernels are in Python and take longer than a small product. The returned function does their work itself where no
    gradient is wanted and nothing is traced.

    `on_cuda` is what the dispatcher calls for CUDA tensors, in Python too. Where nothing observes the operations of this thread, the
    function calls it directly.

    Without `gradients`, the backward pass through a floating-point result of inputs that require gradients raises, as for torch's ops
    without a derivative. Tensors that an op writes to must not require gradients. Tensors that it only accumulates may; their graph is
    not kept.
    """
    names = [argument.name for argument in op._schema.arguments]
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    def with_names(args: tuple, kwargs: dict) -> dict:
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def without_autocast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return op(*args, **kwargs)

    name = op._schema.name.partition("::")[2]
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, without_autocast, key)
    if not written:
        LIBRARY.impl(name, _differentiable(op, gradients, with_names), "Autograd", with_keyset=True)
        return without_autograd(op, on_cuda)

    def takes_no_gradients(keyset, *args, **kwargs):
        given = with_names(args, kwargs)
        _refuse_tangents(name, given)
        if torch.is_grad_enabled():
            for argument in written:
                if given.get(argument) is not None and given[argument].requires_grad:
                    raise ValueError(
                        f"{argument}: expected a tensor that requires no gradient, since {name} writes to it and has no gradient; "
                        "detach it, or call under torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    def counts_versions(keyset, *args, **kwargs):
        given = with_names(args, kwargs)
        check_memory(given, written)
        for argument in written:
            if given.get(argument) is not None:
                torch.autograd.graph.increment_version(given[argument])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    below, increment_version = op._op, torch._C._increment_version

    def call(*args, **kwargs):
        if _is_traced_or_differentiated(args, kwargs):
            return op(*args, **kwargs)
        given = with_names(args, kwargs)
        check_memory(given, written)
        increment_version([given[argument] for argument in written if given.get(argument) is not None])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return below(*args, **kwargs)

    LIBRARY.impl(name, takes_no_gradients, "Autograd", with_keyset=True)
    LIBRARY.impl(name, counts_versions, "ADInplaceOrView", with_keyset=True)
    return call


def gradients_of_product(saved: tuple[str, ...], unpack: Callable[..., torch.Tensor]) -> Gradients:
    """Return the gradients of `x W^T + bias` to `x` and `bias`; `unpack(given, in_features)` makes `W` from the saved tensors."""

    def formula(given, shapes, grad, wanted):
        found = {}
        if "x" in wanted:
            found["x"] = grad @ unpack(given, shapes["x"][-1])
        if "bias" in wanted:
            found["bias"] = grad.reshape(-1, grad.shape[-1]).sum(0)
        return found

    return Gradients(("x", "bias"), saved, formula)


def _differentiable(op: torch._ops.OpOverload, gradients: Gradients | None, with_names: Callable) -> Callable:
    name = op._schema.name.partition("::")[2]

    def below(keyset, args, kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, positional, keywords, *values):
            args, kwargs = values[:positional], dict(zip(keywords, values[positional:], strict=True))
            if gradients is not None:
                given = with_names(args, kwargs)
                tensors = {known: value for known, value in given.items() if isinstance(value, torch.Tensor)}
                ctx.names, ctx.shapes = list(given), {known: value.shape for known, value in tensors.items()}
                ctx.rest = {known: value for known, value in given.items() if known not in tensors}
                ctx.save_for_backward(*(tensors[known] for known in gradients.saved))
            return below(keyset, args, kwargs)

        @staticmethod
        def backward(ctx, *grads):
            if gradients is None:
                raise RuntimeError(
                    f"{name}: has no gradient, but one was requested; detach its inputs, or call it under torch.no_grad()"
                )
            wanted = {known for known, needed in zip(ctx.names, ctx.needs_input_grad[3:], strict=True) if needed}
            saved = dict(zip(gradients.saved, ctx.saved_tensors, strict=True))
            found = gradients.formula({**ctx.rest, **saved}, ctx.shapes, grads[0], wanted)
            return None, None, None, *(found.get(known) for known in ctx.names)

    def kernel(keyset, *args, **kwargs):
        _refuse_tangents(name, kwargs | dict(enumerate(args)))
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs)):
            return below(keyset, args, kwargs)
        if gradients is not None:
            for argument, value in with_names(args, kwargs).items():
                if argument not in gradients.to and isinstance(value, torch.Tensor) and value.requires_grad:
                    raise ValueError(
                        f"{argument}: expected a tensor that requires no gradient, since {name} has no gradient for it"
                    )
        return Function.apply(keyset, len(args), tuple(kwargs), *args, *kwargs.values())

    return kernel


def _refuse_tangents(name: str, given: Mapping) -> None:
    """Raise `RuntimeError` if an argument carries a forward-mode tangent, which would be lost."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in given.values()):
        raise RuntimeError(f"{name}: has no forward-mode gradient, but an input carries a tangent")


def without_autograd(op: torch._ops.OpOverload, on_cuda: Callable | None = None) -> Callable:
    """Return a call of `op` that bypasses the Python autograd kernel unless gradients are wanted: it takes longer than a token.

    It also bypasses the dispatcher for plain CUDA tensors: that calls `on_cuda` after converting every argument twice.
    """
    below, exclude_autograd = op._op, torch._C._AutoDispatchBelowAutograd

    def call(*args, **kwargs):
        if _is_traced_or_differentiated(args, kwargs):
            return op(*args, **kwargs)
        with exclude_autograd():
            if on_cuda is not None and args and args[0].is_cuda and _is_plain(args[0]):
                return on_cuda(*args, **kwargs)
            return below(*args, **kwargs)

    return call


def _is_plain(x: torch.Tensor) -> bool:
    """Return whether only the kernels see a call with `x`: no mode, transform, subclass or autocast takes part in it."""
    return (
        type(x) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_any_autocast_enabled()
    )


def _is_traced_or_differentiated(args: tuple, kwargs: dict) -> bool:
    """Return whether a call has to go through the registered kernels: it is compiled, or its gradients are wanted or refused."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs)
