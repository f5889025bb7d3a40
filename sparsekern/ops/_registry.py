"""The table of ops. Each file beside this one defines its op with `define_op`; C++ and Triton only implement these definitions.

An op is a schema, a pure-PyTorch reference, a fake for `torch.compile`, and sample inputs. The reference is the `default` kernel: it runs
on any device without a compiler. The schema defines the arguments. The reference, the fake, every implementation and the wrapper that users
call have its names, its order and its defaults. The contract tests iterate over `OPS`, so that an op without samples fails a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .. import backends
from ..backends.adapters import signature_of
from ._torch_op import Gradients, complete

NAMESPACE = "sparsekern"
AS_THE_SCHEMA: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Sample:
    """A valid call: `torch.ops.sparsekern.<op>(*args, **kwargs)`."""

    args: tuple
    kwargs: dict


def sample(*args, **kwargs) -> Sample:
    """Return the call with these arguments."""
    return Sample(args, kwargs)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: as in `torch.ops.sparsekern.<name>`.
        reference: PyTorch implementation; takes the arguments of the schema.
        fake: implementation for fake tensors; takes the arguments of the schema.
        samples: yields valid calls.
        friendly: arguments of the wrapper that the schema lacks, each with the arguments of the schema that it replaces. The wrapper
            has it at the position of the first of them.
        only_on_cuda: the reason why the op, its reference included, runs on no other device; empty if it runs on all devices. Such
            an op has no samples.
        call: the op without checks of its arguments, for its wrapper and for callers that check arguments themselves. It bypasses
            the autograd kernels, which are in Python, unless gradients are wanted.
    """

    name: str
    reference: Callable
    fake: Callable
    samples: Callable[[torch.Generator], Iterator[Sample]]
    friendly: Mapping[str, tuple[str, ...]]
    only_on_cuda: str
    call: Callable

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The `torch.ops` overload."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def signature(self) -> inspect.Signature:
        """The arguments of the schema, shared by every function of the op."""
        return signature_of(self.overload._schema)


OPS: dict[str, Op] = {}


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    samples: Callable,
    friendly: Mapping[str, tuple[str, ...]] = AS_THE_SCHEMA,
    only_on_cuda: str = "",
    gradients: Gradients | None = None,
    native: bool = True,
) -> Callable:
    """Define `torch.ops.sparsekern.<name>` and return the function that its wrapper calls: `Op.call`.

    The reference serves every device; a compiled kernel registered for a device takes precedence there. On CUDA devices that kernel
    chooses among the op's implementations in `sparsekern.backends`, if there are any.

    Args:
        name: name of the op; it ends in an underscore if the op writes to its arguments.
        schema: arguments and results, in torch's notation.
        reference: see `Op`.
        fake: see `Op`.
        samples: see `Op`.
        friendly: see `Op`.
        only_on_cuda: see `Op`.
        gradients: gradients of an op with one result; without them a backward pass through the op raises.
        native: whether `sparsekern._C` has a kernel for the op; False if PyTorch's own operators are as fast on a CPU.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    if not only_on_cuda:
        backends.add_op(name, reference, native)
        torch.library.register_kernel(qualified, "default")(backends.last_resort(name))
    on_cuda = backends.dispatcher(name, reference) if backends.has_implementations(name) else None
    if on_cuda is not None:
        torch.library.register_kernel(qualified, "cuda")(on_cuda)
    torch.library.register_fake(qualified)(fake)
    call = complete(getattr(getattr(torch.ops, NAMESPACE), name).default, gradients, on_cuda)
    OPS[name] = Op(name, reference, fake, samples, friendly, only_on_cuda, call)
    return call
