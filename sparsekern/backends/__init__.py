"""Which implementation of an op runs: the compiled kernel on CPU tensors; on CUDA tensors, the first of an ordered table an op.

The first CUDA implementation that is available and supports the call runs. Where a faster one was to be expected and the op's PyTorch
reference runs, the logger `sparsekern` says so, once for an op and a reason. `use` and the environment variable `SPARSEKERN_BACKENDS`
ask for one by name, which then runs or raises: `cpu`, `cuda`, `triton` or `reference`. On CPU tensors the variable counts as it is
when sparsekern is imported.
"""

from .table import (
    REFERENCE,
    Implementation,
    Support,
    add_op,
    asked,
    availability,
    choose,
    dispatcher,
    has_implementations,
    implementations,
    last_resort,
    preferred,
    serve_environment,
    use,
)
from .values import BadValues, LeftToReference, raise_if, value_checks, values_are_checked

__all__ = [
    "REFERENCE",
    "BadValues",
    "Implementation",
    "LeftToReference",
    "Support",
    "add_op",
    "asked",
    "availability",
    "choose",
    "dispatcher",
    "has_implementations",
    "implementations",
    "last_resort",
    "preferred",
    "raise_if",
    "serve_environment",
    "use",
    "value_checks",
    "values_are_checked",
]
