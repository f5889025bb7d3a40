"""Train a pruned model without losing its zeros."""

from .adapter import merge_adapter_
from .keep_sparsity import SparsityKeeper, keep_sparsity

__all__ = ["SparsityKeeper", "keep_sparsity", "merge_adapter_"]
