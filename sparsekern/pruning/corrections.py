"""What is done within a run about the error of what is pruned already: nothing, later inputs follow it, or later targets undo it."""

from __future__ import annotations

NONE, SEQUENTIAL, DENSE = "none", "sequential", "dense"
CORRECTIONS = (NONE, SEQUENTIAL, DENSE)
