"""What the pipeline must know of a model: its repeated blocks and its linear layers, found by looking, not by name."""

from .blocks import Blocks, find_blocks
from .feed_forward import FeedForward, LinearCall, find_feed_forwards
from .linears import Linear, find_linears

__all__ = ["Blocks", "FeedForward", "Linear", "LinearCall", "find_blocks", "find_feed_forwards", "find_linears"]
