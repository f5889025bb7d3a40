"""The command line: one file a command, all read by `main`."""

from .main import main

__all__ = ["main"]
