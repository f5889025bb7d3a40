"""Adapters of kernels that take the arguments of their op: one for C++, and one for Triton.

A kernel that needs more work on the host (a loop, a check of its result, another kernel first) has its own file, named after its op.
"""

from __future__ import annotations

import functools
import importlib
import inspect

import torch

from .implementation import Implementation
from .values import raise_if

PLAIN_CUDA = (
    "gram_symmetrize_",
    "nm_mask",
    "semi_structured_pack",
    "semi_structured_prune_pack",
    "semi_structured_unpack",
    "topk_mask",
)
PLAIN_TRITON = ("gated_split", "int8_linear", "plain_split")


class CudaKernel:
    """A C++ kernel, `torch.ops.sparsekern_cuda.<op>`, called like `torch.ops.sparsekern.<op>`.

    The raw op takes the op's arguments in the op's order, with contiguous tensors. It returns the op's results, followed by a
    `status` if it checks values. Results in arguments that are not contiguous are copied back.
    """

    def __init__(self, op: str) -> None:
        self.op = op

    def __call__(self, *args, **kwargs):
        arguments, raw = _schema_of("sparsekern", self.op).arguments, getattr(torch.ops.sparsekern_cuda, self.op).default
        given = _in_order(arguments, args, kwargs)
        dense = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in given]
        results = raw(*dense)
        results = () if results is None else results if isinstance(results, tuple) else (results,)
        names = [result.name for result in raw._schema.returns]
        if names and names[-1] == "status":
            *results, status = results
            raise_if(status)
        for argument, value, copy in zip(arguments, given, dense, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write and copy is not value:
                value.copy_(copy)
        return tuple(results) if len(results) > 1 else results[0] if results else None

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(_schema_of("sparsekern", self.op))


class TritonKernel:
    """The function `<op>` of `sparsekern.triton_kernels.<op>`, imported at the first call, because it needs Triton."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __call__(self, *args, **kwargs):
        return self._launcher()(*args, **kwargs)

    def _launcher(self):
        return getattr(importlib.import_module(f"sparsekern.triton_kernels.{self.op.rstrip('_')}"), self.op)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._launcher())


def adapted(op: str) -> tuple[Implementation, ...]:
    """Return the implementations of an op that need no file of their own, preferred first."""
    cuda = (Implementation("cuda", CudaKernel(op)),) if op in PLAIN_CUDA else ()
    return (*cuda, Implementation("triton", TritonKernel(op))) if op in PLAIN_TRITON else cuda


def signature_of(schema: torch._C.FunctionSchema) -> inspect.Signature:
    """Return the signature of a Python function that can be called like an op with `schema`."""
    parameters = [
        inspect.Parameter(
            argument.name,
            inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
        )
        for argument in schema.arguments
    ]
    return inspect.Signature(parameters)


def _in_order(arguments, args: tuple, kwargs: dict) -> list:
    """Return the arguments of a call in the schema's order; torch omits those that equal a default."""
    rest = arguments[len(args) :]
    return [*args, *(kwargs[left.name] if left.name in kwargs else left.default_value for left in rest)]


@functools.cache
def _schema_of(namespace: str, op: str) -> torch._C.FunctionSchema:
    return getattr(getattr(torch.ops, namespace), op).default._schema
