"""Choice of the implementation that runs an op: the compiled kernel on CPU tensors; on CUDA tensors, the first suitable one of a table.

The first CUDA implementation that is available and supports the call runs. If the PyTorch reference runs although a faster implementation
was expected, the logger `sparsekern` warns, once per op and reason. `use` and the environment variable `SPARSEKERN_BACKENDS` request an
implementation by name: `cpu`, `cuda`, `triton` or `reference`. It then runs, or the call raises. For CPU tensors the variable is read when
sparsekern is imported.
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
