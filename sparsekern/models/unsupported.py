"""The error for models that compute something that cannot be pruned block by block."""

from __future__ import annotations


class CannotFollow(ValueError):
    """A forward that block-by-block pruning cannot follow, told apart from errors of the model's own."""
