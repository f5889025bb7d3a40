"""sparsekern: prune pretrained transformers fast, and make the zeros pay."""

from ._warnings import SparsekernWarning

__all__ = ["SparsekernWarning"]

__version__ = "0.1.0"
