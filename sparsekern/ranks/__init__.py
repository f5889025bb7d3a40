"""The processes of one run, which `torchrun` starts: who does what, and sums that do not depend on their number."""

from .dealing import LEAVES, deal, leaf_sizes
from .sums import TreeSum
from .world import World

__all__ = ["LEAVES", "TreeSum", "World", "deal", "leaf_sizes"]
