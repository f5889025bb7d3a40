"""The tables of implementations, and the choice among them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .devices import YES, Support, has_capability
from .libraries import LIBRARIES
from .values import BadValues, LeftToReference

REFERENCE = "reference"
VARIABLE = "SPARSEKERN_BACKENDS"


def _always(*args, **kwargs) -> Support:
    return YES


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on a CUDA device.

    Attributes:
        name: the backend, `"cuda"` (C++, in `_C_cuda`) or `"triton"`.
        run: takes the arguments of the op's schema, in its order and with its defaults.
        supports: says whether `run` can serve a call; it names the arguments that it looks at and takes the rest. The compute
            capability that the backend needs is looked at before.
    """

    name: str
    run: Callable
    supports: Callable[..., Support] = _always


def _cuda_library() -> Support:
    library = LIBRARIES["_C_cuda"]
    return Support(library.loaded, library.reason)


@functools.cache
def _triton_package() -> Support:
    found = importlib.util.find_spec("triton") is not None
    return YES if found else Support(False, "triton is not installed")


LEAST_CAPABILITY = {"triton": (8, 0)}  # that all kernels of a backend need
AVAILABILITY: dict[str, Callable[[], Support]] = {"cuda": _cuda_library, "triton": _triton_package}


def availability(backend: str) -> Support:
    """Whether the backend can run at all in this process, whatever the op."""
    return AVAILABILITY[backend]()


def has_implementations(op: str) -> bool:
    """Return whether an op has a CUDA implementation."""
    return bool(implementations(op))


@functools.cache
def implementations(op: str) -> tuple[Implementation, ...]:
    """Return the CUDA implementations of an op, the preferred one first."""
    from .adapters import adapted

    module = f"{__package__}.{op.rstrip('_')}"
    return importlib.import_module(module).IMPLEMENTATIONS if importlib.util.find_spec(module) else adapted(op)


_NOTHING: Mapping[str, str] = MappingProxyType({})
_asked: ContextVar[Mapping[str, str]] = ContextVar("sparsekern_backends", default=_NOTHING)


@contextmanager
def use(**backends: str) -> Iterator[None]:
    """Ask for implementations by name inside a `with` block: `use(obs_sweep="triton", gram_="reference")`.

    Raises:
        ValueError: an op without that implementation. (That it is missing here, or does not support a call, is an error of the call.)
    """
    for op, backend in backends.items():
        _check_name("use", op, backend)
    token = _asked.set({**_asked.get(), **backends})
    try:
        yield
    finally:
        _asked.reset(token)


def choose(op: str, reference: Callable, args: tuple, kwargs: dict) -> Callable:
    """What is to run a call of `op` on a CUDA device.

    Raises:
        RuntimeError: the implementation that was asked for is not available.
        ValueError: it does not support these arguments, or `SPARSEKERN_BACKENDS` does not make sense.
    """
    backend = _asked_for(op)
    if backend is not None:
        return _the_one_asked_for(op, backend, reference, args, kwargs)
    for implementation in implementations(op):
        if availability(implementation.name).ok and supports(implementation, args, kwargs).ok:
            return implementation.run
    return reference


def supports(implementation: Implementation, args: tuple, kwargs: dict) -> Support:
    """Return whether an implementation that is available can serve a call."""
    least = LEAST_CAPABILITY.get(implementation.name)
    capable = YES if least is None else has_capability(device_of_call(args, kwargs), least)
    return implementation.supports(*args, **kwargs) if capable.ok else capable


def device_of_call(args: tuple, kwargs: dict) -> torch.device:
    """Return the device of the first tensor of a call; the ops' own checks want all on one."""
    return next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), torch.device("cpu"))


def preferred(op: str) -> str:
    """The implementation that a call of `op` on a CUDA device gets if that supports its arguments."""
    asked = _asked_for(op)
    if asked is not None:
        return asked
    available = (known.name for known in implementations(op) if availability(known.name).ok)
    return next(available, REFERENCE)


def _asked_for(op: str) -> str | None:
    return _asked.get().get(op) or _from_environment(os.environ.get(VARIABLE, "")).get(op)


def _the_one_asked_for(op: str, backend: str, reference: Callable, args: tuple, kwargs: dict) -> Callable:
    if backend == REFERENCE:
        return reference
    available = availability(backend)
    if not available.ok:
        raise RuntimeError(f"{op}: the {backend} implementation was asked for, but {available.reason}")
    implementation = next(known for known in implementations(op) if known.name == backend)
    supported = supports(implementation, args, kwargs)
    if not supported.ok:
        raise ValueError(f"{op}: the {backend} implementation was asked for, but {supported.reason}")
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
    names = [implementation.name for implementation in implementations(op)] if op.isidentifier() else []
    if not names:
        raise ValueError(f"{where}: expected an op with CUDA implementations, got {op!r}")
    if backend not in (*names, REFERENCE):
        raise ValueError(f"{where}: expected one of {', '.join((*names, REFERENCE))} for {op}, got {backend!r}")


def dispatcher(op: str, reference: Callable) -> Callable:
    """What torch's dispatcher calls for `op` on a CUDA device."""

    def run(*args, **kwargs):
        try:
            return choose(op, reference, args, kwargs)(*args, **kwargs)
        except LeftToReference:
            return reference(*args, **kwargs)
        except BadValues:
            reference(*args, **kwargs)  # whose own checks raise the error that names the place
            raise

    return run
