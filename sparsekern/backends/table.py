"""The table of ops and their implementations, and the choice among them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .adapters import adapted
from .devices import YES, Support, has_capability, has_triton
from .implementation import Implementation
from .libraries import LIBRARIES
from .products import full_float32
from .values import BadValues, LeftToReference

REFERENCE = "reference"
CPU = "cpu"  # the compiled kernels for CPU tensors
VARIABLE = "SPARSEKERN_BACKENDS"


def _cuda_library() -> Support:
    library = LIBRARIES["_C_cuda"]
    return Support(library.loaded, library.reason)


LEAST_CAPABILITY = {"triton": (8, 0)}  # needed by all kernels of a backend
logger = logging.getLogger("sparsekern")

AVAILABILITY: dict[str, Callable[[], Support]] = {"cuda": _cuda_library, "triton": has_triton}


def availability(backend: str) -> Support:
    """Return whether the backend can run in this process at all, whatever the op."""
    return AVAILABILITY[backend]()


def has_implementations(op: str) -> bool:
    """Return whether an op has a CUDA implementation."""
    return bool(implementations(op))


@functools.cache
def implementations(op: str) -> tuple[Implementation, ...]:
    """Return the CUDA implementations of an op, the preferred one first."""
    module = f"{__package__}.{op.rstrip('_')}"
    if importlib.util.find_spec(module) is None:
        return adapted(op)
    return getattr(importlib.import_module(module), "IMPLEMENTATIONS", ())  # such as `devices`, which is not an op


class _Known(NamedTuple):
    reference: Callable
    native: bool


_ops: dict[str, _Known] = {}


def add_op(op: str, reference: Callable, native: bool) -> None:
    """Add an op to the table: its reference, and whether it has a kernel for CPU tensors in `sparsekern._C`."""
    _ops[op] = _Known(full_float32()(reference), native)


_NOTHING: Mapping[str, str] = MappingProxyType({})
_asked: ContextVar[Mapping[str, str]] = ContextVar("sparsekern_backends", default=_NOTHING)
DEVICES = {CPU: {"cpu"}, "cuda": {"cuda"}, "triton": {"cuda"}}  # types of device that a backend runs on


@contextmanager
def use(**backends: str) -> Iterator[None]:
    """Request implementations by name inside a `with` block: `use(obs_sweep="triton", gram_="reference")`.

    The requested implementation runs, or the call raises. `"cpu"` runs on CPU tensors only, `"cuda"` and `"triton"` on CUDA tensors only.
    The request applies to the thread that enters the block. While the block is active, every torch operation of that thread goes through
    Python once more; compiled kernels for CPU tensors are otherwise called directly.

    Args:
        **backends: the implementation for each op: `"cpu"`, `"cuda"`, `"triton"` or `"reference"`.

    Raises:
        ValueError: an op has no such implementation. A call raises if the implementation is unavailable or does not support it.
    """
    for op, backend in backends.items():
        _check_name("use", op, backend)
    with asked(backends), _OnCpu():
        yield


@contextmanager
def asked(backends: Mapping[str, str]) -> Iterator[None]:
    """Request implementations as `use` does, but only for calls on CUDA tensors, at no cost per operation."""
    token = _asked.set({**_asked.get(), **backends})
    try:
        yield
    finally:
        _asked.reset(token)


class _OnCpu(TorchDispatchMode):
    """A dispatch mode that routes calls on CPU tensors to the implementations requested by `use`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func._schema.name.partition("::")[2] if func.namespace == "sparsekern" else None
        if op not in _ops or not _is_plain_cpu(args, kwargs):
            return func(*args, **kwargs)
        run = chosen_on_cpu(op)
        if run is None:
            return func(*args, **kwargs)
        with self:  # also for ops called by a reference
            return run(*args, **kwargs)


def _is_plain_cpu(args: tuple, kwargs: dict) -> bool:
    """Return whether all tensors of a call hold values on a CPU; traced tensors are subclasses."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return all(type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu" for value in tensors)


def chosen_on_cpu(op: str) -> Callable | None:
    """Return the requested implementation of `op` for CPU tensors, or None for the default one.

    Raises:
        RuntimeError: the compiled kernels are requested but not loaded.
        ValueError: an implementation for other devices is requested.
    """
    backend = _requested(op)
    if backend is None:
        return None
    if backend == REFERENCE:
        return _ops[op].reference
    if "cpu" not in DEVICES[backend]:
        raise ValueError(f"{op}: the {backend} implementation was requested, but its tensors are on the CPU")
    if backend == CPU and not LIBRARIES["_C"].loaded:
        raise RuntimeError(f"{op}: the cpu implementation was requested, but it is {LIBRARIES['_C'].reason}")
    return None


def serve_environment() -> None:
    """Apply the current value of `SPARSEKERN_BACKENDS` to CPU tensors; called once, when the kernels are loaded.

    Raises:
        ValueError: the variable is malformed.
    """
    for op, backend in _from_environment(os.environ.get(VARIABLE, "")).items():
        if op in _ops and backend != CPU and _ops[op].native:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's warning that one kernel replaces another, which is intended
                torch.library.register_kernel(f"sparsekern::{op}", "cpu")(last_resort(op))


def last_resort(op: str) -> Callable:
    """Return the kernel for devices without one of their own: the reference, unless another implementation is requested."""
    reference, native = _ops[op]

    def run(*args, **kwargs):
        if device_of_call(args, kwargs).type == "cpu" and chosen_on_cpu(op) is None and native:
            library = LIBRARIES["_C"]
            reason = "the compiled library has no kernel for it: it was built from another version"
            if not library.wanted:
                return reference(*args, **kwargs)
            warn_reference_runs(op, "CPU tensors", reason if library.loaded else f"the CPU kernels are {library.reason}")
        return reference(*args, **kwargs)

    return run


_said: set[tuple[str, str]] = set()


def warn_reference_runs(op: str, where: str, reason: str) -> None:
    """Log a warning, once per op and reason, that the reference runs although a faster implementation was expected."""
    if (op, reason) not in _said:
        _said.add((op, reason))
        logger.warning("%s: the PyTorch reference runs for %s: %s", op, where, reason)


def choose(op: str, reference: Callable, args: tuple, kwargs: dict) -> Callable:
    """Return the implementation that runs a call of `op` on a CUDA device.

    Raises:
        RuntimeError: the requested implementation is not available.
        ValueError: the requested implementation does not support these arguments, or `SPARSEKERN_BACKENDS` is malformed.
    """
    backend = _requested(op)
    if backend is not None:
        return _requested_implementation(op, backend, reference, args, kwargs)
    reasons = []
    for implementation in implementations(op):
        able = availability(implementation.name)
        if able.ok:
            able = supports(implementation, args, kwargs)
        if able.ok:
            return implementation.run
        reasons.append(f"{implementation.name}: {able.reason}")
    warn_reference_runs(op, "CUDA tensors", "; ".join(reasons))
    return reference


def supports(implementation: Implementation, args: tuple, kwargs: dict) -> Support:
    """Return whether an available implementation can serve a call."""
    least = LEAST_CAPABILITY.get(implementation.name)
    capable = YES if least is None else has_capability(device_of_call(args, kwargs), least)
    return implementation.supports(*args, **kwargs) if capable.ok else capable


def device_of_call(args: tuple, kwargs: dict) -> torch.device:
    """Return the device of the first tensor of a call; the ops' checks ensure that all tensors are on it."""
    return next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), torch.device("cpu"))


def preferred(op: str) -> str:
    """Return the name of the implementation that runs `op` on CUDA devices if it supports the arguments."""
    asked = _requested(op)
    if asked is not None:
        return asked
    available = (known.name for known in implementations(op) if availability(known.name).ok)
    return next(available, REFERENCE)


def _requested(op: str) -> str | None:
    return _asked.get().get(op) or _from_environment(os.environ.get(VARIABLE, "")).get(op)


def _requested_implementation(op: str, backend: str, reference: Callable, args: tuple, kwargs: dict) -> Callable:
    if backend == REFERENCE:
        return reference
    if backend == CPU:
        raise ValueError(f"{op}: the cpu implementation was requested, but its tensors are on {device_of_call(args, kwargs)}")
    available = availability(backend)
    if not available.ok:
        raise RuntimeError(f"{op}: the {backend} implementation was requested, but {available.reason}")
    implementation = next(known for known in implementations(op) if known.name == backend)
    supported = supports(implementation, args, kwargs)
    if not supported.ok:
        raise ValueError(f"{op}: the {backend} implementation was requested, but {supported.reason}")
    return implementation.run


@functools.lru_cache(maxsize=8)
def _from_environment(value: str) -> Mapping[str, str]:
    asked = {}
    for entry in filter(None, map(str.strip, value.split(","))):
        op, equals, backend = map(str.strip, entry.partition("="))
        if not equals:
            raise ValueError(f"{VARIABLE}: expected op=implementation, separated by commas, got {entry!r}")
        _check_name(VARIABLE, op, backend)
        asked[op] = backend
    return asked


def _check_name(where: str, op: str, backend: str) -> None:
    names = [CPU] if op in _ops and _ops[op].native else []
    names += [implementation.name for implementation in implementations(op)] if op.isidentifier() else []
    if not names and op not in _ops:
        raise ValueError(f"{where}: expected an op of sparsekern, got {op!r}")
    if backend not in (*names, REFERENCE):
        raise ValueError(f"{where}: expected one of {', '.join((*names, REFERENCE))} for {op}, got {backend!r}")


def dispatcher(op: str, reference: Callable) -> Callable:
    """Return the function that torch's dispatcher calls for `op` on a CUDA device."""
    reference = full_float32()(reference)

    def run(*args, **kwargs):
        try:
            return choose(op, reference, args, kwargs)(*args, **kwargs)
        except LeftToReference:
            return reference(*args, **kwargs)
        except BadValues:
            reference(*args, **kwargs)  # its own checks raise the error that names the place
            raise

    return run
