"""One way to run an op on a CUDA device: an entry of the table of implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .devices import YES, Support


def _always(*args, **kwargs) -> Support:
    return YES


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on a CUDA device.

    Attributes:
        name: the backend, `"cuda"` (C++, in `_C_cuda`) or `"triton"`.
        run: takes the arguments of the op's schema, in its order and with its defaults.
        supports: returns whether `run` can serve a call, given its arguments. The compute capability that the backend needs is
            checked before.
    """

    name: str
    run: Callable
    supports: Callable[..., Support] = _always
