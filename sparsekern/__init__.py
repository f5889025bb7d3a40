"""sparsekern: prune pretrained transformers fast, and make the zeros pay."""

from ._info import info
from ._version import __version__
from ._warnings import SparsekernWarning
from .conversion import moefy
from .data import perplexity
from .export import export_gguf
from .measure.fidelity import fidelity
from .methods import (
    ALPS,
    COPAL,
    BlockTuning,
    Distill,
    ExpertPruning,
    Gradual,
    KPrune,
    Magnitude,
    Method,
    Random,
    SparseGPT,
    SparseLLM,
    Structured,
    Wanda,
)
from .models.load import load, load_tokenizer
from .pattern import NM, Unstructured
from .pruning import prune, prune_continually
from .reports import ContinualReport, ExpertReport, RemovalReport, Report
from .runtime import SparseLinear, pack, save, unpack
from .training import keep_sparsity, merge_adapter_

__all__ = [
    "ALPS",
    "COPAL",
    "BlockTuning",
    "Distill",
    "Gradual",
    "NM",
    "ContinualReport",
    "ExpertPruning",
    "ExpertReport",
    "KPrune",
    "Magnitude",
    "Method",
    "Random",
    "RemovalReport",
    "Report",
    "SparseGPT",
    "SparseLLM",
    "SparseLinear",
    "SparsekernWarning",
    "Structured",
    "Unstructured",
    "Wanda",
    "__version__",
    "export_gguf",
    "fidelity",
    "info",
    "keep_sparsity",
    "load",
    "load_tokenizer",
    "merge_adapter_",
    "moefy",
    "pack",
    "perplexity",
    "prune",
    "prune_continually",
    "save",
    "unpack",
]
