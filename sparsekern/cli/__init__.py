"""The command line: one file for each command, all read by `main`."""

from .main import main

__all__ = ["main"]
