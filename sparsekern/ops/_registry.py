"""The table of ops: each file beside this one adds its op with `define_op`; C++ and Triton only implement what is defined here.

An op is a schema, a pure-PyTorch reference (the `default` kernel, so it runs on any device without a compiler), a fake for
`torch.compile`, and sample inputs. The schema says the arguments: the reference, the fake, every implementation and the wrapper that
users call have its names, its order and its defaults. The contract tests walk `OPS`, so an op without samples is a red test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .. import backends
from ..backends.adapters import signature_of
from ._torch_op import Gradients, complete, without_autograd

NAMESPACE = "sparsekern"
AS_THE_SCHEMA: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Sample:
    """One valid call: `torch.ops.sparsekern.<op>(*args, **kwargs)`."""

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
        reference, fake: take the arguments of the schema.
        samples: yields valid calls.
        friendly: the arguments of the wrapper that the schema does not have, each with those of the schema it stands for. In the
            wrapper it has the place of the first of them.
        only_on_cuda: why the op, its reference included, runs on no other device; empty if it runs on all. Such an op has no samples.
    """

    name: str
    reference: Callable
    fake: Callable
    samples: Callable[[torch.Generator], Iterator[Sample]]
    friendly: Mapping[str, tuple[str, ...]]
    only_on_cuda: str = ""

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The op as torch calls it."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def call(self) -> Callable:
        """The op for callers that check arguments themselves and count microseconds; with positional arguments."""
        return without_autograd(self.overload)

    @property
    def signature(self) -> inspect.Signature:
        """The arguments of the schema, which every function of the op has."""
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
    """Define `torch.ops.sparsekern.<name>` and return what its wrapper calls.

    The reference serves every device; a compiled kernel registered for a device wins there. On CUDA devices that is the choice among
    the implementations in `sparsekern.backends`, where the op has any.

    Args:
        name: of the op; one that writes to its arguments ends in an underscore.
        schema: arguments and results, as torch reads them.
        reference, fake, samples, friendly, only_on_cuda: see `Op`.
        gradients: of an op with one result; without them a backward pass through the op raises.
        native: it has a kernel in `sparsekern._C`; False where PyTorch's own operators do the work on a CPU as well.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    if not only_on_cuda:
        backends.add_op(name, reference, native)
        torch.library.register_kernel(qualified, "default")(backends.last_resort(name))
    if backends.has_implementations(name):
        torch.library.register_kernel(qualified, "cuda")(backends.dispatcher(name, reference))
    torch.library.register_fake(qualified)(fake)
    op = Op(name, reference, fake, samples, friendly, only_on_cuda)
    OPS[name] = op
    return complete(op.overload, gradients)
