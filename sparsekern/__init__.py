"""sparsekern: prune pretrained transformers fast, and make the zeros pay."""

__version__ = "0.1.0"

from ._warnings import SparsekernWarning
from .methods import Magnitude, SparseGPT, Wanda
from .pattern import NM, Unstructured
from .pruning import Report, prune

__all__ = ["NM", "Magnitude", "Report", "SparseGPT", "SparsekernWarning", "Unstructured", "Wanda", "prune"]
