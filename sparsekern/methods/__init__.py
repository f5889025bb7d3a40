"""Pruning methods: the papers' mathematics, one small file each, built on `sparsekern.ops`."""

from ._fields import Setting, check_choice, settings_of, settings_table
from .alps import ALPS
from .base import Method, Solution, Statistics
from .copal import COPAL
from .gradual import Gradual
from .kprune import KPrune
from .magnitude import Magnitude
from .random import Random
from .sparsegpt import SparseGPT
from .sparsellm import SparseLLM
from .structured import Structured
from .wanda import Wanda

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ALPS, COPAL, Gradual, KPrune, Magnitude, Random, SparseGPT, SparseLLM, Structured, Wanda)
}


def resolve_method(method: str | Method) -> Method:
    """A method's name (with the paper's defaults) or config, as a config.

    Raises:
        ValueError: for an unknown name; TypeError: for anything else.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: expected a name or a config such as SparseGPT(), got {method!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(METHODS))} or a config such as SparseGPT(), got {method!r}")
    return METHODS[method]()


__all__ = [
    "ALPS",
    "COPAL",
    "Gradual",
    "KPrune",
    "METHODS",
    "Magnitude",
    "Method",
    "Random",
    "Setting",
    "Solution",
    "SparseGPT",
    "SparseLLM",
    "Statistics",
    "Structured",
    "Wanda",
    "check_choice",
    "resolve_method",
    "settings_of",
    "settings_table",
]
