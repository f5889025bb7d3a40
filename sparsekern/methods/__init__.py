"""Pruning methods: the papers' mathematics, one small file each, built on `sparsekern.ops`."""

from ._fields import Setting, check_choice, settings_of, settings_table
from .alps import ALPS
from .base import BlockMethod, ExpertMethod, GradualMethod, LinearMethod, Method, RemovalMethod, check_method
from .copal import COPAL
from .experts import ExpertPruning
from .four_bits import INT4, FourBits, with_values
from .gradual import Gradual
from .kprune import KPrune
from .magnitude import Magnitude
from .random import Random
from .random_numbers import generator
from .solution import Solution, Team, Work
from .sparsegpt import SparseGPT
from .sparsellm import SparseLLM
from .statistics import ExpertSums, FeatureNorm, Gram, GramImportance, HasGram, HasImportance, HasNorms, SampleImportance
from .structured import Structured
from .tuning import BlockTuning, Distill, Training
from .wanda import Wanda

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (ALPS, COPAL, ExpertPruning, Gradual, KPrune, Magnitude, Random, SparseGPT, SparseLLM, Structured, Wanda)
}


def resolve_method(method: str | Method) -> Method:
    """Return the config of a method: `method` itself, or the one of that name with the paper's defaults.

    Raises:
        ValueError: an unknown name.
        TypeError: anything else, or a config of an incomplete class.
    """
    if isinstance(method, Method):
        check_method(method)
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: expected a name or a config such as SparseGPT(), got {method!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(METHODS))} or a config such as SparseGPT(), got {method!r}")
    return METHODS[method]()


__all__ = [
    "ALPS",
    "COPAL",
    "INT4",
    "METHODS",
    "BlockMethod",
    "BlockTuning",
    "Distill",
    "ExpertMethod",
    "ExpertPruning",
    "ExpertSums",
    "FeatureNorm",
    "FourBits",
    "Gradual",
    "GradualMethod",
    "Gram",
    "GramImportance",
    "HasGram",
    "HasImportance",
    "HasNorms",
    "KPrune",
    "LinearMethod",
    "Magnitude",
    "Method",
    "Random",
    "RemovalMethod",
    "SampleImportance",
    "Setting",
    "Solution",
    "SparseGPT",
    "SparseLLM",
    "Structured",
    "Training",
    "Team",
    "Wanda",
    "Work",
    "check_choice",
    "generator",
    "resolve_method",
    "settings_of",
    "settings_table",
    "with_values",
]
