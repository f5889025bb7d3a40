"""What the pipeline must know of a model: its repeated blocks and its linear layers, found by looking, not by name."""

from .blocks import Blocks, find_blocks
from .linears import Linear, find_linears

__all__ = ["Blocks", "Linear", "find_blocks", "find_linears"]
