"""Which implementation of an op runs on a CUDA device: one ordered table an op, each in the file of the op's name.

The first implementation that is available and supports the call runs; the op's PyTorch reference is the last resort. `use` and the
environment variable `SPARSEKERN_BACKENDS` ask for one by name, which then runs or raises.
"""

from .table import (
    REFERENCE,
    Implementation,
    Support,
    availability,
    choose,
    dispatcher,
    has_implementations,
    implementations,
    preferred,
    use,
)
from .values import BadValues, LeftToReference, raise_if, value_checks, values_are_checked

__all__ = [
    "REFERENCE",
    "BadValues",
    "Implementation",
    "LeftToReference",
    "Support",
    "availability",
    "choose",
    "dispatcher",
    "has_implementations",
    "implementations",
    "preferred",
    "raise_if",
    "use",
    "value_checks",
    "values_are_checked",
]
