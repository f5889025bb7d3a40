"""The error for models that compute something that cannot be pruned block by block."""

from __future__ import annotations


class CannotFollow(ValueError):
    """Raised by a hook in a forward that block-by-block pruning cannot follow, to be told apart from the model's own errors."""
