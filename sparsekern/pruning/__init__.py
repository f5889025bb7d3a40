"""The loops that prune: calibration batches in, a pruned model and a report out."""

from .continual.prune import prune_continually
from .prune import prune
from .session import check_seed

__all__ = ["check_seed", "prune", "prune_continually"]
