"""The table of ops: each file beside this one adds its op with `define_op`; C++ and Triton only implement what is defined here.

An op is a schema, a pure-PyTorch reference (the `default` kernel, so it runs on any device without a compiler), a fake for
`torch.compile`, and sample inputs. The contract tests walk `OPS`, so an op without samples is a red test, not a blind spot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .. import backends

NAMESPACE = "sparsekern"


@dataclass(frozen=True)
class Sample:
    """One valid call: `torch.ops.sparsekern.<op>(*args, **kwargs)`."""

    args: tuple
    kwargs: dict


def sample(*args, **kwargs) -> Sample:
    return Sample(args, kwargs)


@dataclass(frozen=True)
class Op:
    name: str
    schema: str
    reference: Callable
    samples: Callable[[torch.Generator], Iterator[Sample]]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


OPS: dict[str, Op] = {}


def define_op(name: str, schema: str, *, reference: Callable, fake: Callable, samples: Callable) -> torch._ops.OpOverload:
    """Define `torch.ops.sparsekern.<name>` and return its overload.

    `register_kernel("default")` makes the reference serve every device; a compiled kernel registered for a device wins there. On
    CUDA devices that is the choice among the implementations in `sparsekern.backends`, where the op has any.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_kernel(qualified, "default")(reference)
    if backends.has_implementations(name):
        torch.library.register_kernel(qualified, "cuda")(backends.dispatcher(name, reference))
    torch.library.register_fake(qualified)(fake)
    op = Op(name, schema, reference, samples)
    OPS[name] = op
    return op.overload
