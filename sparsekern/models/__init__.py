"""Find a model's blocks, linears, feed-forward networks and units by structure, not by name."""

from .blocks import Blocks, find_blocks
from .feed_forward import FeedForward, LinearCall, find_feed_forwards
from .linears import Linear, find_linears

__all__ = ["Blocks", "FeedForward", "Linear", "LinearCall", "find_blocks", "find_feed_forwards", "find_linears"]
