"""Pruning of models: plans, loops, checkpoints and finished folders."""

from .continual.prune import prune_continually
from .prune import prune
from .session import check_seed

__all__ = ["check_seed", "prune", "prune_continually"]
